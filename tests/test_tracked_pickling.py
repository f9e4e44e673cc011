"""What a pickle of a tracked handle opens, and what it costs: G7 and G8. Of plain handles: test_pickling.py."""

import errno
import multiprocessing
import os
import pickle
import sys

import pytest
import support
from support import CLONE_NEWIPC, CLONE_NEWNS, KINDS, SMALL_QUEUE, open_fds, unique_name

from posix_ipc import O_CREX, ExistentialError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking is for Linux")
mp_integration = pytest.importorskip("posix_ipc.mp_integration")

BY_NAME = {kind.type.__name__: kind for kind in KINDS}
OPTIONS = {"Semaphore": {"initial_value": 1}, "SharedMemory": {"size": 64}, "MessageQueue": SMALL_QUEUE}
each_kind = pytest.mark.parametrize("kind", BY_NAME)


@pytest.fixture
def handle(kind):
    handle = getattr(mp_integration, kind)(unique_name(), O_CREX, **OPTIONS[kind])
    yield handle
    handle.unlink()
    handle.close()


def load_fails(load, number, what):
    """And leaves nothing open."""
    before = open_fds()
    with pytest.raises(ExistentialError, match=what) as caught:
        load()
    assert caught.value.errno == number
    assert open_fds() == before


@each_kind
def test_g7_the_name_is_gone(handle, kind):
    pickled = pickle.dumps(handle)
    handle.unlink()
    load_fails(lambda: pickle.loads(pickled), errno.ENOENT, handle.name)
    assert not BY_NAME[kind].exists(handle.name)


@each_kind
def test_g7_the_name_leads_to_another_object(handle, kind):
    pickled = pickle.dumps(handle)
    handle.unlink()
    intruder = BY_NAME[kind].create(handle.name)
    try:
        load_fails(lambda: pickle.loads(pickled), errno.ESTALE, "another object")
        assert BY_NAME[kind].exists(handle.name)
    finally:
        BY_NAME[kind].close_handle(intruder)
        BY_NAME[kind].remove(handle.name)


@each_kind
def test_g7_made_on_another_host(handle):
    """The identity begins with the boot id of the kernel; test_pickling.py shows that it does."""
    rebuild, (cls, name, identity, *rest), *_ = handle.__reduce__()
    load_fails(lambda: rebuild(cls, name, b"another kernel's" + identity[16:], *rest), errno.ESTALE, "another host")


def load_elsewhere(pickled, flags, kind, name, exists_there):
    support.enter_new_namespaces(flags)
    if flags == CLONE_NEWNS:
        support.mount_shm("size=1m")
    if exists_there:
        BY_NAME[kind].create(name)
    where = "IPC namespace" if flags == CLONE_NEWIPC else "mount namespace"
    load_fails(lambda: pickle.loads(pickled), errno.ESTALE, where)
    assert BY_NAME[kind].exists(name) == exists_there


@pytest.mark.slow
@pytest.mark.parametrize("exists_there", [False, True])
@each_kind
def test_g7_made_in_another_namespace(handle, kind, exists_there):
    flags = CLONE_NEWIPC if kind == "MessageQueue" else CLONE_NEWNS
    support.run_function(load_elsewhere, pickle.dumps(handle), flags, kind, handle.name, exists_there)
    pickle.loads(pickle.dumps(handle)).close()


def held(handles):
    """What a worker has open once it has got its arguments; the handles of earlier tasks should be closed."""
    with handles[0]:
        handles[1].buf[0] = 1
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), len(maps.readlines())


@pytest.mark.slow
@pytest.mark.no_sanitizer
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_g8_workers_stay_flat(method):
    """A short form; `make test-kill` does 100,000 tasks, and looks at memory too."""
    handles = [mp_integration.Semaphore(initial_value=1), mp_integration.SharedMemory(size=64)]
    handles.append(mp_integration.MessageQueue(**SMALL_QUEUE))
    with multiprocessing.get_context(method).Pool(1) as pool:
        seen = pool.map(held, [handles] * 1000, chunksize=1)
    for handle in handles:
        handle.unlink()
        handle.close()
    descriptors, mappings = zip(*seen[100:], strict=True)
    assert max(descriptors) == min(descriptors)
    assert max(mappings) - min(mappings) <= 4  # of the allocator
