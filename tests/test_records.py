"""What the journals of living processes say is true while others end, strike out, move and pickle at the same time."""

import fcntl
import itertools
import os
import pickle
import platform
import select
import sys
import threading

import pytest
from lifetime import BY_NAME, DIRECTORY, OPTIONS, belong_to_a_new_tree, die_after, existing, make
from stepping import Stepped, is_allowed
from support import run_privately, run_threads

import posix_ipc
from posix_ipc import BusyError, MessageQueue, _ext, _journal, _owners, _reaper, mp_integration
from posix_ipc.mp_integration import SharedMemory

NAMES = list(BY_NAME)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")
needs_ptrace = pytest.mark.skipif(not is_allowed(), reason="needs ptrace")

# ---- a process ends while one of its threads creates ----

# The call by which a name comes to be: first on x86_64, then on all younger architectures.
_LINKAT, _MQ_OPEN, _FLOCK = (265, 240, 73) if platform.machine() == "x86_64" else (37, 180, 32)


def creating_beside_the_end(kind, go_on, ended):
    tracker = belong_to_a_new_tree()
    make("Semaphore", "/first").unlink()

    def end():
        os.read(go_on, 1)
        for process in _journal.existing():
            process.close_journals()
        _reaper.reap()
        os.write(ended, b".")

    ending = threading.Thread(target=end)
    ending.start()
    yield
    made = make(kind, "/made")
    ending.join()
    del made, tracker


def end_in_the_midst(kind):
    go_on, ended = os.pipe(), os.pipe()
    met = False
    with Stepped(creating_beside_the_end(kind, go_on[0], ended[1])) as child:
        for _ in child.stops():
            if not met and child.system_call() == (_MQ_OPEN if kind == "MessageQueue" else _LINKAT):
                met = True
                os.write(go_on[1], b".")
                select.select([ended[0]], [], [], 0.2)  # in vain: it waits for the creation
        assert existing([(kind, "/made")])
    assert met
    _reaper.reap()
    assert not existing([(kind, "/made")])
    assert not list(DIRECTORY.iterdir())


@pytest.mark.slow
@needs_ptrace
@pytest.mark.parametrize("kind", NAMES)
def test_g1_what_a_thread_is_about_to_create_when_the_journal_closes_is_recorded(kind):
    run_privately(end_in_the_midst, kind)


# ---- somebody else has locked it ----


def lock_for_a_while(kind):
    """As a sweep does, which reads all journals anew while it has locked many objects: for longer where many live."""
    tracker = belong_to_a_new_tree()
    made = make(kind, "/locked")
    made.close()
    if kind == "MessageQueue":
        locked = BY_NAME[kind].type("/locked").mqd
    else:
        locked = os.open(BY_NAME[kind].file_of("/locked"), os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    threading.Timer(0.2, fcntl.flock, [locked, fcntl.LOCK_UN]).start()
    getattr(mp_integration, kind).attach("/locked")
    made.unlink()
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_an_attach_waits_for_a_sweep_that_takes_its_time(kind):
    run_privately(lock_for_a_while, kind)


def creating_in_vain():
    tracker = belong_to_a_new_tree()
    yield
    with pytest.raises(BusyError):
        make("MessageQueue", "/made")
    del tracker


def lock_and_replace():
    stranger = rival = None
    with Stepped(creating_in_vain()) as child:
        for _ in child.stops():
            if rival is None and child.system_call() == _FLOCK and existing([("MessageQueue", "/made")]):
                stranger = MessageQueue("/made")
                fcntl.flock(stranger.mqd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stranger.unlink()
                rival = BY_NAME["MessageQueue"].create("/made")
    assert rival is not None
    assert existing([("MessageQueue", "/made")])


@pytest.mark.slow
@needs_ptrace
def test_g6_a_queue_that_cannot_be_leased_is_not_unlinked_in_place_of_one_that_took_its_name():
    run_privately(lock_and_replace)


# ---- a handle gets another object while it unlinks its own ----


def open_another_one_meanwhile(kind):
    tracker = belong_to_a_new_tree()
    handle = make(kind, "/first")
    again = []

    def open_another_one(event, arguments):
        if event.endswith("unlink") and not again:
            again.append(event)
            handle.__init__("/second", posix_ipc.O_CREX, **OPTIONS[kind])

    sys.addaudithook(open_another_one)
    handle.unlink()
    assert again
    assert handle.name == "/second"
    assert handle.owned
    handle.unlink()
    handle.close()
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_unlinking_forgets_the_record_of_what_it_unlinks(kind):
    run_privately(open_another_one_meanwhile, kind)


# ---- a journal moves while somebody strikes an object out ----


def moving():
    tracker = belong_to_a_new_tree()
    made = make("SharedMemory", "/moved")
    (process,) = _journal.existing()
    yield
    process.journals[0].move_to(process.path("j1"))
    del made, tracker


def strike_everywhere():
    """Who strikes has read the journal before it moves; how many system calls later he strikes is tried in turn."""
    strike = _ext._strike
    for later in itertools.count(1):
        with Stepped(moving()) as owner:
            stops = owner.stops()
            next(stops)
            went_on = []

            def strike_later(*args, stops=stops, went_on=went_on, later=later):
                if not went_on:
                    went_on += itertools.islice(stops, later)
                return strike(*args)

            _ext._strike = strike_later
            _reaper.disown(_ext._facts_at("/dev/shm/moved")[:3])
            for _ in stops:
                pass
            said = [entry for _, contents in _owners.Records().journals for entry in contents.entries]
            assert [entry for entry in said if entry.state == _journal.OWNED] == [], f"struck out {later} stops later"
        BY_NAME["SharedMemory"].remove("/moved")
        _reaper.reap()
        if len(went_on) < later:
            break
    print(later)


@pytest.mark.slow
@needs_ptrace
def test_what_is_struck_out_of_a_journal_that_moves_is_not_owned():
    assert int(run_privately(strike_everywhere)) > 10


# ---- claims: a pickle is in flight, and its object belongs to a tree that is dead ----


def stays_as_long_as_the_claim(kind):
    assert _reaper.reap() == []
    assert existing([(kind, "/claimed")])
    (process,) = _journal.existing()
    process.close_journals()
    assert [removed.name for removed in _reaper.reap(ending=[process.token])] == ["/claimed"]


def pickle_in_two_threads(kind):
    """Both ask whether it is recorded before either writes it down."""
    tracker = belong_to_a_new_tree()
    die_after(make, kind, "/claimed")
    both = threading.Barrier(2)

    class Asked(getattr(mp_integration, kind)):
        def _share(self, tree):
            shared = super()._share(tree)
            both.wait(30)
            return shared

    handle = Asked.attach("/claimed")
    run_threads(handle.__reduce__, handle.__reduce__)
    handle.close()
    stays_as_long_as_the_claim(kind)
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_g5_two_threads_that_pickle_a_handle_leave_one_claim(kind):
    run_privately(pickle_in_two_threads, kind)


def take_and_die():
    SharedMemory.attach("/claimed").take_ownership()


def take_what_another_handle_claims():
    tracker = belong_to_a_new_tree()
    die_after(make, "SharedMemory", "/claimed")
    first, second = SharedMemory.attach("/claimed"), SharedMemory.attach("/claimed")
    pickle.dumps(first)
    pickle.dumps(second)
    first.take_ownership()
    first.close()
    second.close()
    die_after(take_and_die)  # it is owned by nobody else now
    stays_as_long_as_the_claim("SharedMemory")
    del tracker


@pytest.mark.slow
def test_g5_taking_ownership_leaves_a_claim_to_the_other_handle():
    run_privately(take_what_another_handle_claims)


def claim_take_and_die():
    handle = SharedMemory.attach("/claimed")
    pickle.dumps(handle)
    handle.take_ownership()


def take_what_one_has_pickled():
    tracker = belong_to_a_new_tree()
    die_after(make, "SharedMemory", "/claimed")
    worker = os.fork()
    if worker == 0:
        claim_take_and_die()
        os._exit(0)
    os.waitpid(worker, 0)
    assert _reaper.reap() == []
    assert existing([("SharedMemory", "/claimed")])
    del tracker


@pytest.mark.slow
def test_g5_what_a_worker_has_pickled_and_then_taken_stays_as_long_as_the_root():
    run_privately(take_what_one_has_pickled)


def pass_on_in_another_tree(kind):
    tracker = belong_to_a_new_tree()
    reader, writer = os.pipe()

    def make_and_pickle():
        with open(writer, "wb") as pipe:
            pickle.dump(make(kind, "/claimed"), pipe)

    die_after(make_and_pickle)
    os.close(writer)
    with open(reader, "rb") as pipe:
        handle = pickle.load(pipe)
    passed_on = pickle.dumps(handle)
    handle.close()
    assert _reaper.reap() == []
    handle = pickle.loads(passed_on)  # in any process of this tree
    worker = os.fork()
    if worker == 0:
        pickle.dumps(handle)
        os._exit(len(_journal.existing()))
    assert os.waitpid(worker, 0)[1] == 0  # the claim of whoever brought it here is enough
    handle.close()
    stays_as_long_as_the_claim(kind)
    del tracker


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_g5_a_pickle_of_one_tree_that_is_passed_on_in_another_is_kept_for_that_one(kind):
    run_privately(pass_on_in_another_tree, kind)
