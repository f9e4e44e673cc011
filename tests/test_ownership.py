"""Who owns a tracked object: one process, wherever it was taken to, until it says that the object persists."""

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import sys

import pytest
from lifetime import BY_NAME, belong_to_a_new_tree, die_after, existing, in_a_worker, make
from support import KINDS, run_privately, skip

from posix_ipc import ExistentialError, _journal, _reaper, unlink_message_queue
from posix_ipc.mp_integration import Semaphore, SharedMemory, track, untrack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")

NAMES = [kind.type.__name__ for kind in KINDS]

# ---- it moves ----


def create_and_wait(kind, pipe, go_on):
    """In a tree of its own: make an object, send it, and see that somebody else owns it in the end."""
    handle = make(kind, "/taken")
    assert handle.owned
    pipe.send(handle)
    os.read(go_on, 1)
    assert not handle.owned


def take(kind, persists):
    stay, go_on = os.pipe()
    reader, writer = multiprocessing.Pipe(duplex=False)
    maker = os.fork()
    if maker == 0:
        os.close(go_on)
        die_after(create_and_wait, kind, writer, stay)
        os._exit(0)
    taken = reader.recv()
    taken.take_ownership()
    os.close(go_on)
    assert os.waitpid(maker, 0)[1] == 0
    if persists:
        untrack(taken).close()
    else:
        taken.close()
        assert _reaper.reap() == []
        assert existing([(kind, "/taken")])


def taken_from_another_process(kind, persists):
    die_after(take, kind, persists)
    _reaper.reap()
    assert bool(existing([(kind, "/taken")])) == persists


@pytest.mark.slow
@pytest.mark.parametrize("persists", [False, True], ids=["and tracked", "and untracked"])
@pytest.mark.parametrize("kind", NAMES)
def test_an_object_is_taken_from_a_process_that_lives(kind, persists):
    run_privately(taken_from_another_process, kind, persists)


def take_from_a_pickle():
    first = make("SharedMemory", "/kept")
    second = pickle.loads(pickle.dumps(first))
    second.take_ownership()
    untrack(second).close()
    assert not first.owned


def persists_for_every_handle():
    die_after(take_from_a_pickle)
    assert _reaper.reap() == []
    assert existing([("SharedMemory", "/kept")])


@pytest.mark.slow
def test_what_was_untracked_is_owned_through_no_other_handle():
    run_privately(persists_for_every_handle)


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_gone_cannot_be_taken(kind, name):
    handle = make(kind, name)
    attached = type(handle).attach(name)
    handle.unlink()
    with pytest.raises(ExistentialError, match="lost its name") as caught:
        attached.take_ownership()
    assert caught.value.name == name
    assert not attached.owned
    handle.close()
    attached.close()


def be_robbed(robber):
    """In a tree of its own: make an object, of which somebody else becomes the owner."""
    tracker = belong_to_a_new_tree()
    handle = make("SharedMemory", "/contested")
    robber.send(handle.name)
    while robber.recv():
        robber.send(handle.owned)
    del tracker


@contextlib.contextmanager
def object_of_another():
    """A handle on an object of another process, and a function that tells who owns it: that process, this one."""
    ours, theirs = multiprocessing.Pipe()
    maker = os.fork()
    if maker == 0:
        be_robbed(theirs)
    try:
        handle = SharedMemory.attach(ours.recv())

        def owners():
            ours.send("Are you the owner?")
            return ours.recv(), handle.owned

        yield handle, owners
    finally:
        os.kill(maker, signal.SIGKILL)
        os.waitpid(maker, 0)


def take_in_vain(handle, first):
    """Striking out the owner fails, after `first` was done."""
    strike = _reaper.disown

    def disown(identity, except_in, struck):
        first(strike, identity, except_in, struck)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    _reaper.disown = disown
    with pytest.raises(OSError, match="Too many"):
        handle.take_ownership()
    _reaper.disown = strike


def fail_and_try_again():
    with object_of_another() as (taken, owners):
        take_in_vain(taken, lambda strike, *arguments: None)
        assert owners() == (True, False)
        taken.take_ownership()
        assert owners() == (False, True)


def fail_half_way():
    with object_of_another() as (taken, owners):
        take_in_vain(taken, lambda strike, *arguments: strike(*arguments))
        assert owners() == (False, True)


@pytest.mark.slow
def test_what_was_taken_half_way_is_not_without_an_owner():
    run_privately(fail_half_way)


@pytest.mark.slow
def test_what_could_not_be_taken_has_one_owner_and_is_taken_the_next_time():
    run_privately(fail_and_try_again)


def track_and_go_on(kind):
    """The plain handle is of use as before, when the tracked one is closed too."""
    plain = BY_NAME[kind].create("/plain")
    track(plain).close()
    if kind == "Semaphore":
        plain.release()
        assert plain.value == 1
    elif kind == "SharedMemory":
        plain.buf[0] = 1
    else:
        plain.send(b"message")
        assert plain.receive() == (b"message", 0)
    assert existing([(kind, "/plain")])


def goes_with_its_process(kind):
    die_after(track_and_go_on, kind)
    assert existing([(kind, "/plain")])
    assert [each.name for each in _reaper.reap()] == ["/plain"]
    assert not existing([(kind, "/plain")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_what_is_tracked_later_goes_with_its_process(kind):
    run_privately(goes_with_its_process, kind)


def track_in_a_worker(kind):
    tracker = belong_to_a_new_tree()
    keeper = SharedMemory(size=8)  # this root has something to live for
    in_a_worker(lambda: track(BY_NAME[kind].create("/plain")))
    assert [each.name for each in _reaper.reap()] == ["/plain"]
    assert not existing([(kind, "/plain")])
    del tracker, keeper


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_g4_what_a_worker_tracked_later_and_never_shared_goes_with_it(kind):
    run_privately(track_in_a_worker, kind)


def take_what_is_in_flight(kind, inherited):
    tracker = belong_to_a_new_tree()
    sent = make(kind, "/sent")
    pickled = pickle.dumps(sent)
    in_a_worker(lambda: (sent if inherited else type(sent).attach("/sent")).take_ownership())
    sent.close()
    assert _reaper.reap() == []
    received = pickle.loads(pickled)
    received.unlink()
    del tracker, received


@pytest.mark.slow
@pytest.mark.parametrize("inherited", [True, False], ids=["by the handle it inherited", "by name"])
@pytest.mark.parametrize("kind", NAMES)
def test_g5_what_is_in_flight_is_kept_when_who_took_it_dies(kind, inherited):
    run_privately(take_what_is_in_flight, kind, inherited)


# ---- how it is written down ----


def make_what_others_unlink():
    tracker = belong_to_a_new_tree()
    for _ in range(10 * _journal.FIRST_SLOTS):
        semaphore = Semaphore()
        other = pickle.loads(pickle.dumps(semaphore))
        other.unlink()
        other.close()
        semaphore.close()
    kept = Semaphore()
    for _ in range(10 * _journal.FIRST_SLOTS):
        attached = Semaphore.attach(kept.name)
        pickle.dumps(attached)
        attached.close()
    (process,) = _journal.existing()
    assert len(process.journals) <= 2
    kept.unlink()
    del tracker


@pytest.mark.slow
def test_what_others_unlink_and_what_is_claimed_again_takes_no_room():
    run_privately(make_what_others_unlink)


def make_queues_that_others_unlink():
    """Nobody can look whether a queue is there without opening it, but whoever closes it sees."""
    tracker = belong_to_a_new_tree()
    for count in range(2 * _journal.FIRST_SLOTS):
        queue = make("MessageQueue", "/unlinked")
        unlink_message_queue("/unlinked")
        if count % 2:
            queue.close()
        del queue
    (process,) = _journal.existing()
    (journal,) = process.journals
    with open(journal.path, "rb") as file:
        assert _journal.read(file.fileno()).entries == []
    queue = make("MessageQueue", "/kept")
    queue.close()
    assert queue.owned
    queue.unlink()
    del tracker


@pytest.mark.slow
def test_a_queue_that_others_unlink_takes_no_room_when_it_is_closed():
    run_privately(make_queues_that_others_unlink)


class Equal(SharedMemory):
    def __eq__(self, other):
        return True


def test_a_subclass_may_say_what_equals_what(name):
    with Equal.create(name, size=8) as first, Equal(size=8) as second:
        assert first == second
        assert first.owned
        assert second.owned


def use_another_effective_user():
    if os.getuid() != 0:
        skip("needs another user")
    made = []
    for user in (0, 65534, 0, 65534):
        os.seteuid(user)
        made.append(SharedMemory(size=8))
    os.seteuid(0)
    directories = {os.path.dirname(process.journals[0].path) for process in _journal.existing()}
    assert directories == {b"/dev/shm/.posix_ipc-0", b"/dev/shm/.posix_ipc-65534"}
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_effective_user_has_journals_of_its_own():
    with pytest.raises(AssertionError, match=f"status {128 + signal.SIGKILL}"):
        run_privately(use_another_effective_user)
