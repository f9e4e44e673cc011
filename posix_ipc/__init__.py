"""POSIX named semaphores, shared memory and message queues.

These are the plain objects of POSIX: they live until they are unlinked, whatever happens to the processes that made
them. See shm_overview(7), sem_overview(7) and mq_overview(7).

Constants:

- O_CREAT, O_EXCL, O_CREX (both), O_TRUNC, O_NONBLOCK: `flags` of the constructors, as in open(2). O_RDONLY, O_WRONLY
  and O_RDWR are accepted and mean nothing there: a handle's access is that of `read_only`, `read` and `write`.
- PAGE_SIZE: bytes of a page of memory; a segment takes whole ones.
- SEMAPHORE_VALUE_MAX: the largest value of a semaphore.
- SEMAPHORE_TIMEOUT_SUPPORTED: False where the system has no sem_timedwait(3); `acquire()` with a timeout other than
  None and 0 raises OSError (ENOSYS) there.
- SEMAPHORE_VALUE_SUPPORTED: False where it has no sem_getvalue(3); `value` raises OSError (ENOSYS) there.
- MESSAGE_QUEUES_SUPPORTED: False where there are no queues; MessageQueue, unlink_message_queue and the constants that
  follow do not exist there.
- QUEUE_MESSAGES_MAX_DEFAULT, QUEUE_MESSAGE_SIZE_MAX_DEFAULT: `max_messages`, and `max_message_size` in bytes, of a new
  queue that asks for nothing else.
- QUEUE_PRIORITY_MAX: the highest priority of a message.
- USER_SIGNAL_MIN, USER_SIGNAL_MAX: the real-time signals, which may be asked for as notifications; see signal(7).
- VERSION, __version__: of this package.
"""

from posix_ipc._ext import (
    MESSAGE_QUEUES_SUPPORTED,
    O_CREAT,
    O_CREX,
    O_EXCL,
    O_NONBLOCK,
    O_RDONLY,
    O_RDWR,
    O_TRUNC,
    O_WRONLY,
    PAGE_SIZE,
    SEMAPHORE_TIMEOUT_SUPPORTED,
    SEMAPHORE_VALUE_MAX,
    SEMAPHORE_VALUE_SUPPORTED,
    VERSION,
    BusyError,
    Error,
    ExistentialError,
    PermissionsError,
    Semaphore,
    SharedMemory,
    SignalError,
    __version__,
    unlink_semaphore,
    unlink_shared_memory,
)

__all__ = [
    "MESSAGE_QUEUES_SUPPORTED",
    "O_CREAT",
    "O_CREX",
    "O_EXCL",
    "O_NONBLOCK",
    "O_RDONLY",
    "O_RDWR",
    "O_TRUNC",
    "O_WRONLY",
    "PAGE_SIZE",
    "SEMAPHORE_TIMEOUT_SUPPORTED",
    "SEMAPHORE_VALUE_MAX",
    "SEMAPHORE_VALUE_SUPPORTED",
    "VERSION",
    "BusyError",
    "Error",
    "ExistentialError",
    "PermissionsError",
    "Semaphore",
    "SharedMemory",
    "SignalError",
    "__version__",
    "unlink_semaphore",
    "unlink_shared_memory",
]

if MESSAGE_QUEUES_SUPPORTED:
    from posix_ipc._ext import (
        QUEUE_MESSAGE_SIZE_MAX_DEFAULT,
        QUEUE_MESSAGES_MAX_DEFAULT,
        QUEUE_PRIORITY_MAX,
        USER_SIGNAL_MAX,
        USER_SIGNAL_MIN,
        MessageQueue,
        unlink_message_queue,
    )

    __all__ += [
        "QUEUE_MESSAGES_MAX_DEFAULT",
        "QUEUE_MESSAGE_SIZE_MAX_DEFAULT",
        "QUEUE_PRIORITY_MAX",
        "USER_SIGNAL_MAX",
        "USER_SIGNAL_MIN",
        "MessageQueue",
        "unlink_message_queue",
    ]
