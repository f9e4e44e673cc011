"""Objects that go away with their test; that nothing else stays is what the plugin of the package sees to."""

import contextlib
import gc
import os
import signal

import pytest
import support
from support import KINDS, MESSAGE_QUEUE, SEMAPHORE, SHARED_MEMORY

import posix_ipc

pytest_plugins = ["pytester", "skips"]


def pytest_configure():
    """What a shell runs in the background ignores Ctrl-C, and so does all that this starts; many tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What was collected stays: a collection of garbage, which looking for leaks may need, has not to look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.failed = False
    support.names_handed_out.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test marked `private` proves by itself what it says: no neighbour's sweep removes what it should not find."""
    if pyfuncitem.get_closest_marker("private") is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    support.run_apart_if_allowed(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """When all is over, remove what is left of the names this test got, and fail the test for it.

    The plugin, which has looked by now, knows what this process and its multiprocessing children made. Here it is about
    what any other program of the test made, and about the next test.
    """
    report = yield
    item.failed = item.failed or report.failed
    if call.when == "teardown":
        names = tuple(support.names_handed_out)
        left = _remove_files(names) + _remove_queues(names)
        if left and not item.failed:  # else the failure itself is the news
            report.outcome, report.longrepr = "failed", f"left behind by another program: {', '.join(left)}"
    return report


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
