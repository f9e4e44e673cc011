/* What the files of the extension share: the module state, the three handle types' common head, and the helpers.
 *
 * Locking. Every field of a handle that can change after construction is read and written inside the handle's critical
 * section (free-threaded build) or under the interpreter lock (all other builds; there the macros below expand to
 * a block). No section contains a call that can run Python code or wait, so sections never nest.
 */
#ifndef POSIX_IPC_EXT_H
#define POSIX_IPC_EXT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h> /* T_PYSSIZET, which has this name in all versions */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* Named queues exist on other systems too, but nobody has run this code there: Linux only, and said so by a constant. */
#if defined(__linux__)
#define HAVE_MESSAGE_QUEUES 1
#else
#define HAVE_MESSAGE_QUEUES 0
#endif

/* Linux maps a semaphore's file itself (see semaphore_file.c); elsewhere the C library's sem_open does. The macro
 * POSIX_IPC_PORTABLE selects the second way on Linux too, so that it can be compiled and tested there. */
#if defined(__linux__) && !defined(POSIX_IPC_PORTABLE)
#define MAP_SEMAPHORE_FILES 1
#else
#define MAP_SEMAPHORE_FILES 0
#endif

#define QUEUE_MAX_MESSAGES 10 /* the defaults: what Linux allows without privileges unless it is told otherwise */
#define QUEUE_MAX_MESSAGE_SIZE 8192
#define QUEUE_PRIORITY_LIMIT 32767 /* MQ_PRIO_MAX - 1 */

/* Leases and journals stand on what Linux alone gives: see lease.c. */
#define HAVE_TRACKING MAP_SEMAPHORE_FILES

#undef HAVE_SEM_TIMEDWAIT /* Python has these names too, for what was there where it was built */
#undef HAVE_SEM_GETVALUE
#undef HAVE_SEM_CLOCKWAIT
#if defined(__APPLE__)
#define HAVE_SEM_TIMEDWAIT 0
#define HAVE_SEM_GETVALUE 0
#else
#define HAVE_SEM_TIMEDWAIT 1
#define HAVE_SEM_GETVALUE 1
#endif

#if defined(__GLIBC__)
#if __GLIBC_PREREQ(2, 30) /* a line of its own: who has no such macro cannot read it */
#define HAVE_SEM_CLOCKWAIT 1
#endif
#endif
#if !defined(HAVE_SEM_CLOCKWAIT)
#define HAVE_SEM_CLOCKWAIT 0
#endif

#if defined(__APPLE__) || defined(__OpenBSD__)
#define HAVE_ALLOCATE 0
#else
#define HAVE_ALLOCATE 1 /* posix_fallocate(3) */
#endif

#if defined(SEM_VALUE_MAX)
#define SEMAPHORE_VALUE_LIMIT SEM_VALUE_MAX
#else
#define SEMAPHORE_VALUE_LIMIT 32767 /* _POSIX_SEM_VALUE_MAX, what every system must allow */
#endif

#define SHM_DIRECTORY "/dev/shm/" /* where glibc (since 2.34) and musl keep segments and semaphores */
#define SHM_PATH_SIZE (sizeof(SHM_DIRECTORY) + NAME_MAX + 1)

/* Where there is an interpreter lock it is the critical section. Python defines these only since 3.13, and there without a
 * use of the argument, which compilers remark on. */
#if !defined(Py_GIL_DISABLED)
#undef Py_BEGIN_CRITICAL_SECTION
#undef Py_END_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(op) { (void)(op);
#define Py_END_CRITICAL_SECTION() }
#endif

/* ---- module state ---- */

typedef struct Notifier Notifier;

typedef struct {
    PyObject *Error;
    PyObject *SignalError;
    PyObject *PermissionsError;
    PyObject *ExistentialError;
    PyObject *BusyError;
    PyTypeObject *Semaphore;
    PyTypeObject *SharedMemory;
    PyTypeObject *MessageQueue;
    PyTypeObject *Export; /* of memory, to those who view it */
    PyTypeObject *Journal;
    PyObject *rebuild;   /* the function that every pickle of a handle names */
    uint8_t boot_id[16]; /* of this host's kernel; zeros where it cannot be read */
    _Atomic(Notifier *) notifier; /* the callbacks armed in this interpreter; a forked child begins with a new one */
    _Atomic bool notifications_stopped; /* the interpreter is about to end; a forked child inherits that */
} State;

/* The state of the module that defined `type` or the base it inherits from; NULL with an exception set when the
 * interpreter has already taken the module apart. */
State *state_of_type(PyTypeObject *type);
State *state_of(PyObject *self);

/* ---- identity.c: which kernel object, of all that ever had this name ---- */

/* Travels in pickles as raw bytes, compared with memcmp: fixed widths, no padding. A zero means "not known". */
typedef struct {
    uint8_t boot_id[16];
    uint64_t device;
    uint64_t inode;
    uint64_t born;      /* ns since the epoch: some file systems hand out an inode number again at once */
    uint64_t namespace; /* inode of the IPC namespace; queues only, files are told apart by their device */
} Identity;

_Static_assert(sizeof(Identity) == 48, "Identity has no padding");

typedef struct {
    Identity identity;
    mode_t mode;
    uid_t uid;
    uint64_t links; /* 0: it has lost its name */
    int64_t size;
} FileFacts;

typedef enum { KIND_SEMAPHORE, KIND_SHARED_MEMORY, KIND_MESSAGE_QUEUE } Kind;

void identity_read_boot_id(uint8_t boot_id[16]);
/* 0, or -1 with errno. The boot id is not filled in. */
int identity_facts(int descriptor, FileFacts *facts);
/* The same of the segment that has this name, without opening it. */
int identity_of_segment(const char *name, FileFacts *facts);
/* The same by path, which is not followed if it is a symbolic link. */
int identity_facts_at(const char *path, FileFacts *facts);
uint64_t identity_ipc_namespace(void);
bool identity_same_object(const Identity *a, const Identity *b);
/* Does `descriptor` still lead to the object? (Its number may have been closed and handed out again.) */
bool identity_leads_to(int descriptor, const Identity *identity);
/* New bytes for a pickle. */
PyObject *identity_pack(const State *state, const Identity *identity, Kind kind);
int identity_unpack(PyObject *packed, Identity *identity);
/* Raises ExistentialError when the pickle was made under another kernel. */
int identity_check_host(State *state, const Identity *wanted, PyObject *name);
/* Raises ExistentialError that says why `name` does not lead to `wanted`: `found` is what it leads to, NULL if nothing. */
void identity_raise_mismatch(State *state, const Identity *wanted, const Identity *found, Kind kind, PyObject *name);

/* ---- errors.c: from an errno to the right exception ---- */

/* Raises what `error` means, naming the failing call, the object (`name` may be NULL) and a limit that was hit.
 * `reason` replaces the system's text if it is not NULL. Always returns NULL. */
PyObject *raise_errno(State *state, int error, const char *call, PyObject *name, const char *reason);
/* Raises `type` (a posix_ipc.Error) with its attributes errno (0: None) and name. Always returns NULL. */
PyObject *raise_error(PyObject *type, int error, PyObject *name, const char *format, ...);
/* Raises OSError, or its subclass for this errno, with filename `name` unless that is NULL. Always returns NULL. */
PyObject *raise_os_error(int error, PyObject *name, PyObject *message);
/* Raises ExistentialError for a handle that is closed, or was never opened (name is NULL). Always returns NULL. */
PyObject *raise_closed(State *state, const char *call, PyObject *name);
/* After EINTR: runs the Python signal handlers, then raises SignalError, with what a handler raised as its cause;
 * KeyboardInterrupt, SystemExit and their like pass through as they are. Always returns NULL. */
PyObject *raise_interrupted(State *state, const char *call, PyObject *name);

/* ---- limits.c: which limit of the system did a call run into ---- */

/* Writes " (limit, value, where it is set)", or "", about `call` having failed with `error`. */
void limit_describe(char *text, size_t size, const char *call, int error);
/* The same for the sizes asked of a new queue. */
void limit_describe_queue(char *text, size_t size, long max_messages, long max_message_size);

/* ---- args.c: what callers pass ---- */

typedef struct {
    const char *function;
    const char *const *names;
    int count;
    int required;
    int positional; /* how many may be given without their name */
} Signature;

/* METH_FASTCALL | METH_KEYWORDS: borrowed references, NULL where an argument was not given. */
int args_bind(const Signature *signature, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
              PyObject **bound);
/* tp_init: new references, because converting one argument can run code that drops the others. */
int args_bind_init(const Signature *signature, PyObject *args, PyObject *kwargs, PyObject **bound);
void args_release(const Signature *signature, PyObject **bound);

/* All of these leave the default in place when `arg` is NULL, and *out untouched on failure. */
int args_integer(PyObject *arg, const char *what, int64_t minimum, int64_t maximum, int64_t *out);
int args_flags(PyObject *arg, int *out);
int args_mode(PyObject *arg, mode_t *out);
int args_bool(PyObject *arg, const char *what, bool *out);

#define FOREVER INT64_MAX
/* Seconds to nanoseconds; None is FOREVER, and so is what no clock will reach. */
int args_timeout(PyObject *arg, int64_t *nanoseconds);

/* str or bytes to both: the text for people, the bytes for the kernel. New references. */
int args_name(PyObject *arg, PyObject **text, PyObject **encoded);
/* The name for a constructor with these flags: None takes a new random one, and some flags make no sense. */
int args_name_for(PyObject *arg, int flags, PyObject **text, PyObject **encoded);

/* ---- journal.c: what this process owns, in a file that outlives it ---- */

typedef struct JournalObject JournalObject;

/* The state of a slot, as it stands in the file. */
typedef enum {
    SLOT_FREE = 0,
    SLOT_INTENT = 1, /* a queue that may exist: it gets its identity only by being made */
    SLOT_OWNED = 2,  /* goes when its process is dead and nobody leases it */
    SLOT_CLAIM = 3,  /* stays as long as its process lives */
} SlotState;

/* False in a child of a fork, where none of the functions below touches anything. */
bool journal_is_ours(JournalObject *journal);
/* From here to its release the journal is neither closed nor moved; false in a child of a fork. May wait: without the
 * interpreter lock. */
bool journal_hold(JournalObject *journal);
void journal_release(JournalObject *journal);
/* The index of a new slot, or -1 when there is none free. */
int journal_add(JournalObject *journal, SlotState state, Kind kind, const char *name, const Identity *identity,
                bool shared);
void journal_confirm(JournalObject *journal, int index, const Identity *identity); /* from intent to owned */
/* The others do nothing if the slot speaks of another object by now. */
void journal_share(JournalObject *journal, int index, const Identity *identity);
bool journal_remove(JournalObject *journal, int index, const Identity *identity);
SlotState journal_state(JournalObject *journal, int index, const Identity *identity);
PyObject *journal_strike(PyObject *module, PyObject *args);

/* ---- lease.c: tracked handles ---- */

/* Where an object stands in a journal: journal is NULL if nowhere. */
typedef struct {
    JournalObject *journal; /* a reference */
    int index;
    Identity identity; /* of what the slot speaks, unknown while it is an intent */
} Record;

/* What makes a handle a tracked one, or may make it one. */
typedef struct {
    bool active;
    pid_t creator; /* of a plain one: the process that made the object through it; 0: the object was there */
    uint64_t tree; /* whose root keeps it, for it came from a pickle that was made there; 0: none, or not known */
    Record record;
} Tracking;

#define NO_SLOT EXFULL /* the errno of a journal without a free slot */

/* All that return an int: 0 or an errno. */
int lease_lock(int descriptor);  /* a shared flock; EBUSY: another program keeps it locked */
/* The name as it is recorded: for files any number of slashes at its beginning is the same as one. */
const char *record_name(const char *name);
/* Before an object is made or gets its name. The journal is held from then on, so that no sweep takes it for a dead
 * one's in between: record_settle() when the object has its name, or when its record is removed again. */
int record_add(Record *record, SlotState state, Kind kind, const char *name, const Identity *identity);
void record_settle(Record *record);
void record_confirm(Record *record, const Identity *identity); /* from intent to owned */
SlotState record_state(const Record *record);
void record_remove(Record *record); /* the slot, not the reference */

/* ---- handle.c: the head that the three types share, and the pin ---- */

typedef struct {
    PyObject_HEAD
    PyObject *weak_references;
    PyObject *name;    /* str as given; NULL until an open succeeds */
    PyObject *encoded; /* bytes: the name as the kernel sees it */
    mode_t mode;
    Identity identity;
    bool owned;        /* made by unpickling, or tracked: what it holds is closed with it */
    Tracking tracking;
} NamedObject;

/* Fills in the head under the critical section and gives back, in place, what it replaced. */
void named_swap(NamedObject *self, PyObject **name, PyObject **encoded, mode_t mode, const Identity *identity,
                bool owned, Tracking *tracking);
/* What named_swap gave back, outside of the section. */
void named_drop(PyObject *name, PyObject *encoded, Tracking *tracking);
/* What a pickle says of the tree that it was made in, and untrack() of who made the object. */
void named_set_origin(NamedObject *self, uint64_t tree, bool created_here);
/* Every deallocator's first and last call. */
void named_begin_dealloc(NamedObject *self);
void named_end_dealloc(NamedObject *self);
/* The members that make a type weakly referable. */
extern struct PyMemberDef named_members[];
/* New references, both NULL before the first open. */
void named_get(NamedObject *self, PyObject **name, PyObject **encoded);
PyObject *named_str(PyObject *self);
PyObject *named_get_name(PyObject *self, void *closure);
PyObject *named_get_mode(PyObject *self, void *closure);
/* Unlinks by name, without the interpreter lock. */
PyObject *named_unlink(NamedObject *self, Kind kind);
PyObject *unlink_by_name(State *state, PyObject *arg, Kind kind);
/* The audit event of opening by these flags; with O_CREAT it is that of creating, which cannot be known before. */
int audit_open(Kind kind, int flags, PyObject *name);
int audit_unlink(Kind kind, PyObject *name);
/* 0 or an errno. Where the file of a semaphore or a segment of this name is. */
int object_path(Kind kind, const char *name, char path[SHM_PATH_SIZE]);
/* The value of __reduce__. */
PyObject *named_reduce(NamedObject *self, Kind kind, int options);
/* "posix_ipc.TYPE("NAME", mode=OCTAL" and `rest`, a str that closes the bracket. */
PyObject *named_repr(NamedObject *self, const char *type, PyObject *rest);
/* Raises what `error` means for this handle: EBADF that it is closed, EINTR what the signal handlers left. */
PyObject *named_raise(NamedObject *self, int error, const char *call, const char *reason);

/* What a blocking call holds on to outside the critical section. `close` takes it away from its object at once; it
 * goes when the last call that uses it has left. */
typedef struct Handle {
    void (*release)(struct Handle *); /* closes what it holds, not the memory */
    unsigned users;                   /* calls that use it now */
    pid_t pid;                        /* whose calls: after a fork the parent's waiting threads are not in the child */
    bool closed;
    bool keep_open; /* the caller may go on using the descriptor */
    sem_t *semaphore;
    int descriptor;
    Identity identity;
} Handle;

Handle *handle_new(void (*release)(Handle *)); /* for a kernel object that is yet to be opened: free it with PyMem_Free */
void handle_free(Handle *handle);
/* Inside the critical section: */
void handle_pin(Handle *handle);
bool handle_close(Handle *handle); /* true: nobody uses it, the caller frees it */
/* Outside: ends a pin, and frees a handle that was closed meanwhile. */
void handle_unpin(NamedObject *self, Handle *handle);

/* ---- clock.c: waiting on clocks ---- */

struct timespec clock_after(clockid_t clock, int64_t nanoseconds);
int64_t clock_remaining(clockid_t clock, const struct timespec *deadline);

/* ---- tracked.c: what the classes of mp_integration stand on ---- */

#if HAVE_TRACKING
#define TRACKED_METHODS \
    {"_share", tracked_share, METH_O, tracked_share_doc}, \
    {"_record", tracked_record, METH_VARARGS, tracked_record_doc}, \
    {"_forget", tracked_forget, METH_NOARGS, tracked_forget_doc},
#define TRACKED_GETSET \
    {"_owned", tracked_get_owned, NULL, PyDoc_STR("Does this process's journal say that this process owns it?"), NULL}, \
    {"_identity", tracked_get_identity, NULL, PyDoc_STR("(device, inode, born in ns)"), NULL}, \
    {"_created_here", tracked_get_created_here, NULL, PyDoc_STR("Has this process made the object, through this plain handle?"), NULL},
extern const char tracked_share_doc[], tracked_record_doc[], tracked_forget_doc[], tracked_unlink_doc[];
PyObject *tracked_share(PyObject *self, PyObject *tree);
PyObject *tracked_record(PyObject *self, PyObject *args);
PyObject *tracked_forget(PyObject *self, PyObject *ignored);
PyObject *tracked_get_owned(PyObject *self, void *closure);
PyObject *tracked_get_identity(PyObject *self, void *closure);
PyObject *tracked_get_created_here(PyObject *self, void *closure);
/* (journal, name, mode, ...): new references to the text and the bytes of the name; borrowed to the rest. */
int tracked_create_arguments(State *state, PyObject *args, int extra, JournalObject **journal, PyObject **name,
                             PyObject **encoded, mode_t *mode);
/* Frees the record of an object that others have unlinked, of which the last chance to hear is here. In the critical section,
 * or a deallocator, before the descriptor is closed. */
void tracked_forget_if_gone(NamedObject *self, int descriptor);

/* What an unlink is about, read at one moment: meanwhile another thread may open something else through the handle. */
typedef struct {
    PyObject *name;
    PyObject *encoded;
    Identity identity;
    Record record;
} Unlinking;

/* Unlinks by name if the name leads to this very object, silently if it does not, and forgets the record: between the two
 * calls, of which the first may fail with -1. `error` is 0 or the errno of `call`; ENOENT: it is gone. */
int tracked_begin_unlink(NamedObject *self, Kind kind, Unlinking *unlinking);
PyObject *tracked_end_unlink(NamedObject *self, Unlinking *unlinking, const char *call, int error);
/* All of it, of a semaphore or a segment. */
PyObject *tracked_unlink_file(NamedObject *self, Kind kind);
#endif

/* ---- shm_file.c: files of /dev/shm that get a name only when they are complete ---- */

typedef struct {
    int descriptor;
    char temporary[SHM_PATH_SIZE]; /* empty where the kernel can make a file without a name */
} ShmFile;

/* Every page up to the size, so that a full file system is an error here, not a SIGBUS. 0 or an errno; ENOSYS: not here. */
int shm_file_allocate(int descriptor, off_t size);
/* The others return 0, or -1 with errno. */
int shm_file_begin(ShmFile *file, mode_t mode);
int shm_file_publish(ShmFile *file, const char *path, bool leased);
/* Closes; what was not published is gone. Keeps errno. Who wants to go on with the descriptor does not call it. */
void shm_file_end(ShmFile *file);

/* ---- semaphore_file.c: a named semaphore in memory ---- */

#if defined(__GLIBC__)
#define SEMAPHORE_FILE_PREFIX "sem."
#else
#define SEMAPHORE_FILE_PREFIX "" /* musl */
#endif

/* Return 0 or an errno. EILSEQ: the file is too short, or no file at all; touching it would be a SIGBUS. */
typedef struct {
    sem_t *semaphore;
    Identity identity;
    const char *failed; /* the call that did */
} OpenedSemaphore;

int semaphore_file_path(const char *name, char path[SHM_PATH_SIZE]);
int semaphore_file_open(const char *name, OpenedSemaphore *opened, bool leased);
/* With a record: leased, and written down before it has its name. */
int semaphore_file_create(const char *name, mode_t mode, unsigned value, OpenedSemaphore *opened, Record *record);
void semaphore_file_close(sem_t *semaphore);

/* ---- notification.c: callbacks of message queues ---- */

/* What a callback needs. Dropping it may run Python code. */
typedef struct {
    PyObject *queue;
    PyObject *callback;
    PyObject *param;
} References;

void references_drop(References *references);
void notifier_release(Notifier *notifier);
/* The interpreter is about to end: no callback begins after this. */
void notifier_stop(State *state);
/* Asks the kernel to tell when a message arrives in the empty queue; `callback(param)` then runs once in a thread of
 * its own. Keeps `queue` alive until it has run or is cancelled. 0 or an errno: then *failed is the call that did, and what
 * was armed before stays so. What it replaced is the caller's to drop. Makes no Python object: the caller has a pin. */
int notification_arm(State *state, PyObject *queue, int mqd, const Identity *identity, PyObject *callback,
                     PyObject *param, References *replaced, const char **failed);
/* Raises what that means. */
void notification_raise(State *state, int error, const char *failed, PyObject *name);
/* The same for a signal, or (NULL) for nothing. 0 or an errno. */
struct sigevent;
int notification_replace(State *state, int mqd, const Identity *queue, const struct sigevent *event,
                         References *replaced);
/* The callback that was armed through this handle, if any, does not run any more; -1: the queue is closed. */
void notification_cancel(State *state, PyObject *queue, int mqd, References *cancelled);

/* message_queue.c: for the thread of a notification. */
Handle *message_queue_pin(PyObject *queue, int *descriptor); /* NULL: closed */
void message_queue_unpin(PyObject *queue, Handle *handle);
void message_queue_cancel(State *state, PyObject *queue);

/* ---- system.c: system calls that Python does not offer ---- */

/* 1: somebody holds the file locked; 0: nobody does, or there is none; -1 with errno. */
int system_probe_lock(const char *path);
PyObject *system_facts(PyObject *module, PyObject *descriptor);
PyObject *system_facts_at(PyObject *module, PyObject *path);
PyObject *system_is_locked(PyObject *module, PyObject *path);
PyObject *system_is_tmpfs(PyObject *module, PyObject *path);
PyObject *system_rename_noreplace(PyObject *module, PyObject *args);
PyObject *system_watch(PyObject *module, PyObject *path);
PyObject *system_pidfd_open(PyObject *module, PyObject *pid);
PyObject *system_start_tracker(PyObject *module, PyObject *args);

/* ---- the types ---- */

enum { OPTION_READ_ONLY = 1, OPTION_READ = 2, OPTION_WRITE = 4, OPTION_NONBLOCK = 8, OPTION_TRACKED = 16,
       OPTION_CREATED = 32, /* in no pickle: what untrack() says of the plain handle that it returns */
       OPTIONS_ALL = 63 };

extern PyType_Spec semaphore_spec;
extern PyType_Spec shared_memory_spec;
extern PyType_Spec export_spec;
extern PyType_Spec message_queue_spec;
extern PyType_Spec journal_spec;

/* Open what a pickle names, in a fresh object of the type. Never create. 0, or -1 with an exception set. */
int semaphore_reopen(State *state, PyObject *self, PyObject *name, mode_t mode, int options, const Identity *wanted);
int shared_memory_reopen(State *state, PyObject *self, PyObject *name, mode_t mode, int options,
                         const Identity *wanted);
int message_queue_reopen(State *state, PyObject *self, PyObject *name, mode_t mode, int options,
                         const Identity *wanted);

#endif
