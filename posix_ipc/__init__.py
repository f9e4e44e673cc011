"""POSIX named semaphores, shared memory and message queues.

These are the plain objects of POSIX: they live until they are unlinked, whatever happens to the processes that made
them. See shm_overview(7), sem_overview(7) and mq_overview(7).
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
