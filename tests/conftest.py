"""Objects that go away with their test, and the proof that nothing else stays."""

import contextlib
import gc
import os

import pytest
import support
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY

import posix_ipc


def pytest_configure(config):
    config.addinivalue_line("markers", "leaves_descriptors: the test means to leave descriptors of its objects open")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.failed = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Remove what is left of the names this test got, and fail the test for it."""
    support.names_handed_out.clear()
    yield
    names = tuple(support.names_handed_out)
    left = _remove_files(names) + _remove_queues(names)
    if not request.node.get_closest_marker("leaves_descriptors"):
        left += [f"descriptor {number}" for number in _close_descriptors(names)]
    if left and not getattr(request.node, "failed", True):  # else the failure itself is the news
        pytest.fail(f"left behind: {', '.join(left)}")


def _remove_files(names):
    removed = []
    for entry in os.listdir("/dev/shm"):
        if entry.removeprefix("sem.").startswith(tuple(name[1:] for name in names) or ("\0",)):
            path = f"/dev/shm/{entry}"
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
                removed.append(path)
    return removed


def _remove_queues(names):
    return [f"queue {name}" for name in names if MESSAGE_QUEUE.remove(name)]


def _close_descriptors(names):
    if _descriptors(names):
        gc.collect()  # handles in cycles, such as those of an exception, its traceback and their frames
    closed = _descriptors(names)
    for number in closed:
        os.close(number)
    return [f"{number} ({target!r})" for number, target in closed.items()]


def _descriptors(names):
    return {fd: target for fd, target in support.open_fds().items() if any(name[1:] in target for name in names)}


@pytest.fixture
def names():
    """Return a function that makes unique legal names."""
    return support.unique_name


@pytest.fixture
def name():
    return support.unique_name()


def _factory(kind):
    """Return a fixture: a function that opens an object, by default a new small one, which goes away with the test."""

    @pytest.fixture
    def factory():
        made = []

        def make(name=None, flags=posix_ipc.O_CREX, type=kind.type, **options):
            if flags & posix_ipc.O_CREAT:
                options = {**kind.options, **options}
            handle = type(name or support.unique_name(), flags, **options)
            made.append(handle)
            return handle

        yield make
        for handle in made:
            with contextlib.suppress(posix_ipc.Error, ValueError):
                kind.close_handle(handle)
            kind.remove(handle.name)

    return factory


semaphore = _factory(SEMAPHORE)
segment = _factory(SHARED_MEMORY)
queue = _factory(MESSAGE_QUEUE)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.type.__name__)
def kind(request):
    return request.param


@pytest.fixture
def make(kind, request):
    """Return the factory of `kind`."""
    return request.getfixturevalue({SEMAPHORE: "semaphore", SHARED_MEMORY: "segment", MESSAGE_QUEUE: "queue"}[kind])
