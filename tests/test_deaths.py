"""Death at every system call of what tracked objects are made of: nothing stays, and nothing live goes (G1 to G5).

Each test forks a child once for each stop that ptrace makes in an operation, before and after each call, and kills it
there. One sweep later everything must be as before: the whole of a /dev/shm that nobody else uses is compared.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import time

import pytest
from lifetime import BY_NAME, DIRECTORY, OPTIONS, belong_to_a_new_tree, has_ended, make, pretend_tracker, trackers
from stepping import Stepped, is_allowed
from support import have_no_file_without_a_name, run_forked, run_privately, wait_until

import posix_ipc
from posix_ipc import _journal, _reaper, mp_integration

needs_ptrace = pytest.mark.skipif(not is_allowed(), reason="needs ptrace")
pytestmark = [pytest.mark.slow, needs_ptrace]

KINDS = list(OPTIONS)


def everywhere(function, *args):
    """Run a function of this file in a /dev/shm of its own; the number that it prints: how often something died."""
    return int(run_privately(function, *args))


# ---- the operations: what precedes `yield` is preparation ----


def first_creation(kind, world):
    """With the journal."""
    yield
    make(kind, world.name)


def next_creation(kind, world):
    made = make("Semaphore", world.name + "-first")
    made.close()
    yield
    make(kind, world.name)


def creation_in_a_full_journal(kind, world):
    _journal.FIRST_SLOTS = 1
    made = make("Semaphore", world.name + "-first")
    made.close()
    yield
    make(kind, world.name)


def creation_that_fails(kind, world):
    """The name belongs to an object that lives, or is none, which the kernel alone knows of a queue."""
    yield
    for name in (world.live[kind].name, world.name + "/b"):
        with contextlib.suppress(posix_ipc.Error, ValueError):
            make(kind, name)


def attaching(kind, world):
    cls, name = getattr(mp_integration, kind), world.live[kind].name
    yield
    cls.attach(name)


def unpickling(kind, world):
    yield
    pickle.loads(world.pickles[kind])


def sharing_what_one_made(kind, world):
    made = make(kind, world.name)
    yield
    pickle.dumps(made)


def sharing_what_one_inherited(kind, world):
    inherited = world.live[kind]
    yield
    pickle.dumps(inherited)


def taking_ownership(kind, world):
    attached = getattr(mp_integration, kind).attach(world.name)
    yield
    attached.take_ownership()


def unlinking(kind, world):
    made = make(kind, world.name)
    yield
    made.unlink()


def closing(kind, world):
    made = make(kind, world.name)
    yield
    made.close()


def forking(_, world):
    made = [make(kind, world.name) for kind in KINDS]
    yield
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    del made


def exiting(_, world):
    """As a process of multiprocessing does."""
    multiprocessing.util._run_after_forkers()
    made = [make(kind, world.name) for kind in KINDS]
    if mp_integration._inherited_token() != world.token:
        pickle.dumps(made[0])  # else it would stay as long as the root, as it should
    yield
    multiprocessing.util._exit_function()


def reaping(_, world):
    """What a dead worker left."""
    yield
    _reaper.reap()


# ---- the world in which it dies ----


class World:
    """The root of the tree, with live objects; of the three families each, and an own /dev/shm.

    Its tracker is only a lock that says that there is one, so that nobody else sweeps.
    """

    def __init__(self):
        self.token = _journal.own_token()
        self._tracker = pretend_tracker(self.token)
        self.live = {kind: make(kind, f"/live-{kind}") for kind in KINDS}
        self._closed = {kind: make(kind, f"/closed-{kind}") for kind in KINDS}  # protected by the journal alone
        self.pickles = {kind: pickle.dumps(handle) for kind, handle in self.live.items()}
        for handle in self._closed.values():
            handle.close()
        plain = [getattr(posix_ipc, kind)(f"/plain-{kind}", posix_ipc.O_CREX, **OPTIONS[kind]) for kind in KINDS]
        self._keep = [*self.live.values(), *self._closed.values(), *plain]
        self.name = "/mortal"
        self._before = self._left()
        self._swept_again = 0

    def leave_a_corpse(self, *kinds):
        """A worker is dead, and owned objects that nobody uses."""
        child = os.fork()
        if child == 0:
            for kind in kinds or KINDS:
                make(kind, self.name)
            os._exit(0)
        os.waitpid(child, 0)

    def sweep(self, death):
        """Everything is as before after one sweep.

        A few times it may take another one: who reads /proc/PID/maps of a process keeps its mappings, with their locks,
        beyond its death.
        """
        _reaper.reap()
        while not self._is_as_before(death):
            self._swept_again += 1
            assert self._swept_again < 10, f"left after {death}: {self._left()}; before: {self._before}"
            time.sleep(0.05)
            _reaper.reap()

    def _is_as_before(self, death):
        for handle in self._keep:
            assert BY_NAME[type(handle).__name__].exists(handle.name), f"{handle!r} is destroyed after {death}"
        return self._left() == self._before

    def _left(self):
        names = [self.name, self.name + "-first"]
        objects = [(kind, name) for kind in KINDS for name in names if BY_NAME[kind].exists(name)]
        return objects, sorted([*os.listdir("/dev/shm"), *os.listdir(DIRECTORY)])


def as_root_of_its_own(operation):
    """The operation of a process that belongs to no other tree."""
    tracker = belong_to_a_new_tree()
    next(operation)
    yield
    next(operation, None)
    tracker.close()


def become_parent_of_orphans():
    """Of those among the descendants: see PR_SET_CHILD_SUBREAPER in prctl(2)."""
    if ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) != 0:
        raise OSError("prctl failed")


def die_at(stop, operation):
    """What a failure says of it; None if the operation had ended before."""
    death = None
    with Stepped(operation) as child:
        for _ in itertools.islice(child.stops(), stop - 1, stop):
            death = f"death at stop {stop}, system call {child.system_call()}"
            child.kill()
            break
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()  # for what it forked too
    return death


def die_everywhere(name, kinds, root):
    """Die at the first stop of an operation, at the second, and so on, until it comes to its end before."""
    become_parent_of_orphans()
    world = World()
    operation = globals()[name]
    deaths = 0
    for kind in kinds:
        for stop in itertools.count(1):
            lent = make(kind, world.name) if operation is taking_ownership else None
            if operation is reaping:
                world.leave_a_corpse()
            mortal = operation(kind, world)
            death = die_at(stop, as_root_of_its_own(mortal) if root else mortal)
            if lent is not None:
                _reaper.reap()
                assert BY_NAME[kind].exists(world.name), f"what another process owns too is destroyed: {death}"
                lent.unlink()
                lent.close()
            world.sweep(death or "its end")
            if death is None:
                break
            deaths += 1
    print(deaths)


def each_operation(*operations):
    return pytest.mark.parametrize("operation", [operation.__name__ for operation in operations])


@each_operation(first_creation, next_creation, creation_in_a_full_journal, creation_that_fails)
def test_g4_death_of_a_worker_that_creates(operation):
    assert everywhere(die_everywhere, operation, KINDS, False) > 90


def die_everywhere_without_nameless_files():
    have_no_file_without_a_name()
    die_everywhere(next_creation.__name__, ["Semaphore", "SharedMemory"], root=False)


def test_g4_death_while_an_object_has_another_name():
    assert everywhere(die_everywhere_without_nameless_files) > 50


@each_operation(attaching, unpickling, taking_ownership, unlinking, closing)
def test_g5_death_of_a_worker_that_uses(operation):
    assert everywhere(die_everywhere, operation, KINDS, False) > 10


@each_operation(first_creation, sharing_what_one_made, sharing_what_one_inherited)
def test_g2_death_of_a_root_that_makes_or_shares(operation):
    assert everywhere(die_everywhere, operation, KINDS, True) > 5


@each_operation(forking, exiting)
@pytest.mark.parametrize("root", [False, True], ids=["worker", "root"])
def test_g2_death_in_fork_and_exit(operation, root):
    assert everywhere(die_everywhere, operation, [None], root) > 5


def test_g5_death_of_the_reaper():
    assert everywhere(die_everywhere, "reaping", [None], False) > 50


# ---- a rival takes the name while the reaper is at it ----


def take_over(kind, name):
    """The name belongs to somebody else's object from now on. It has a lease, as everything that lives."""
    BY_NAME[kind].remove(name)
    return getattr(posix_ipc, kind)(name, posix_ipc.O_CREX, **OPTIONS[kind])


def take_over_everywhere(kind, lives):
    """Before each call of a sweep in turn; the reaper dies `lives` stops after it has put the rival's name aside."""
    world = World()
    aside_with_the_rival = 0
    for stop in itertools.count(1, 2):
        world.leave_a_corpse(kind)
        rival, seen = None, 0
        with Stepped(reaping(None, world)) as reaper:
            for number, _ in enumerate(reaper.stops(), 1):
                if number == stop and BY_NAME[kind].exists(world.name):
                    rival = take_over(kind, world.name)
                if rival is not None and not BY_NAME[kind].exists(world.name):
                    seen += 1
                    if seen > lives:
                        reaper.kill()
                        break
        aside_with_the_rival += seen > 0
        _reaper.reap()
        if rival is None and number < stop:
            break
        if rival is not None:
            assert BY_NAME[kind].exists(world.name), f"the name taken at stop {stop} is gone"
            rival.unlink()
            getattr(rival, BY_NAME[kind].close)()
        world.sweep(f"a rival at stop {stop}")
    print(aside_with_the_rival)


@pytest.mark.parametrize(
    ("kind", "lives"), [("Semaphore", 100), ("SharedMemory", 100), ("SharedMemory", 0), ("SharedMemory", 1)]
)
def test_g6_a_name_that_is_taken_while_the_reaper_looks(kind, lives):
    """The reaper renames it aside, sees that it is another's, and gives it back; if it dies, the next one does."""
    assert everywhere(take_over_everywhere, kind, lives) > 0


# ---- the tracker dies while it is started ----


def creating(token, world):
    """In a process of the tree of this token, which may be its root."""
    multiprocessing.current_process()._config["posix_ipc_token"] = token or _journal.own_token()
    yield
    make("Semaphore", world.name).unlink()


def create_in_tree(token, world):
    run_forked(lambda: list(creating(token, world)))


def die_while_it_starts(whose):
    """1 is the process that prepares it, 2 the tracker itself, until it runs its own program."""
    world = World()
    for stop in itertools.count(1, 2):
        with Stepped(creating(None, world), follow=True) as root:
            token = _journal.token_of(root.pid)
            killed = False
            for number, _ in enumerate(root.stops(whose), 1):
                if number == stop:
                    root.kill(whose)
                    killed = True
            create_in_tree(token, world)
            (tracker,) = wait_until(lambda token=token: trackers(token))
        wait_until(lambda tracker=tracker: has_ended(tracker))
        world.sweep(f"death at stop {stop}")
        if not killed:
            break
    print(stop // 2)


@pytest.mark.parametrize("whose", [1, 2])
def test_g10_death_of_the_tracker_while_it_starts(whose):
    assert everywhere(die_while_it_starts, whose) > 5
