/* posix_ipc._ext.Journal: what a process owns, in a file that outlives it.
 *
 * The file is locked (flock) by an open file that only a mapping keeps open, and the mapping is not inherited by a fork:
 * so the lock is held exactly as long as this one process lives, whatever happens to its descriptors and children. Who
 * finds the lock free knows that the process is dead and reads in the file what it left.
 *
 * Slots are taken with a compare-and-swap and published by writing their state last, so that no instant of death leaves
 * a record that is half true, and neither threads nor finalizers need a lock: only who takes the memory itself away
 * waits until the others have left it. */
#include "ext.h"

#if HAVE_TRACKING

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC "pipcjrn"
#define VERSION 1

/* The format of the file, in the byte order of the host that alone reads it: a header, then slots of the same size. */
typedef struct {
    _Atomic uint8_t state;
    uint8_t kind;
    uint8_t shared; /* the object was pickled at least once */
    uint8_t reserved;
    uint16_t name_length;
    uint16_t reserved2;
    uint64_t device;
    uint64_t inode;
    uint64_t born;
    char name[256];
} Slot;

typedef union {
    struct {
        char magic[8];
        uint32_t version;
        uint32_t slot_size;
        uint64_t ipc_namespace; /* queues of this journal can be found only there */
    };
    Slot size;
} Header;

_Static_assert(sizeof(Slot) == 288 && sizeof(Header) == sizeof(Slot), "what _journal.py reads");

struct JournalObject {
    PyObject_HEAD
    PyObject *path;           /* bytes */
    Header *memory;      /* the file, NULL when closed; not there in a child of a fork */
    _Atomic int users;   /* threads that are using the memory */
    _Atomic bool moving; /* one is about to replace it */
    volatile char *ours; /* a page that a fork wipes: 1 in the process that opened the journal, 0 in its children */
    int count;
    _Atomic int hint; /* where a free slot may be */
    uint64_t device;
    uint64_t inode;
};

/* ---- lifetime ---- */

static size_t
file_size(int count)
{
    return sizeof(Header) + (size_t)count * sizeof(Slot);
}

/* A page that reads 1 here and 0 after a fork; NULL with errno. */
static volatile char *
new_fork_flag(void)
{
    long page = sysconf(_SC_PAGESIZE);
    char *flag = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (flag == MAP_FAILED) {
        return NULL;
    }
    if (madvise(flag, (size_t)page, MADV_WIPEONFORK) < 0) {
        int error = errno;
        munmap(flag, (size_t)page);
        errno = error;
        return NULL;
    }
    *flag = 1;
    return flag;
}

/* A new file of this name, locked by us. The descriptor, or -1 with errno: EWOULDBLOCK, somebody alive has it; EEXIST,
 * somebody dead had it, and the reaper has not yet done what it says. */
static int
open_locked(const char *path)
{
    struct stat status;
    for (;;) {
        int descriptor = open(path, O_CREAT | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (descriptor < 0) {
            return -1;
        }
        if (flock(descriptor, LOCK_EX | LOCK_NB) < 0 || fstat(descriptor, &status) < 0) {
            int error = errno;
            close(descriptor);
            errno = error;
            return -1;
        }
        if (status.st_nlink > 0 && status.st_size == 0) {
            return descriptor;
        }
        close(descriptor);
        if (status.st_nlink > 0) {
            errno = EEXIST;
            return -1;
        }
        /* it was swept away between open and flock */
    }
}

/* Maps the file so that the mapping alone keeps it open and locked. 0 or an errno. */
static int
map_file(JournalObject *self, int descriptor, Header **mapped)
{
    struct stat status;
    size_t size = file_size(self->count);
    int error = posix_fallocate(descriptor, 0, (off_t)size); /* a full file system says so here, not by SIGBUS */
    if (error != 0) {
        return error;
    }
    if (fstat(descriptor, &status) < 0) {
        return errno;
    }
    self->device = (uint64_t)status.st_dev;
    self->inode = (uint64_t)status.st_ino;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) {
        return errno;
    }
    if (madvise(memory, size, MADV_DONTFORK) < 0) {
        error = errno;
        munmap(memory, size);
        return error;
    }
    *mapped = memory;
    return 0;
}

/* Holds a new file of this path and writes its header. 0 or an errno. */
static int
hold(JournalObject *self, const char *path, Header **mapped)
{
    int descriptor = open_locked(path);
    if (descriptor < 0) {
        return errno;
    }
    int error = map_file(self, descriptor, mapped);
    if (error != 0) {
        unlink(path); /* ours: it is locked */
        close(descriptor);
        return error;
    }
    close(descriptor);
    Header *header = *mapped;
    header->version = VERSION;
    header->slot_size = sizeof(Slot);
    header->ipc_namespace = identity_ipc_namespace();
    atomic_signal_fence(memory_order_seq_cst); /* whoever finds no magic finds no header: see _journal.read */
    memcpy(header->magic, MAGIC, sizeof(MAGIC));
    return 0;
}

static PyObject *
journal_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *path;
    int count;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Journal() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O&i:Journal", PyUnicode_FSConverter, &path, &count)) {
        return NULL;
    }
    State *state = state_of_type(type);
    JournalObject *self = state != NULL && count > 0 ? (JournalObject *)type->tp_alloc(type, 0) : NULL;
    if (self == NULL) {
        Py_DECREF(path);
        return state != NULL && count <= 0 ? PyErr_Format(PyExc_ValueError, "a journal needs slots, not %d", count)
                                           : NULL;
    }
    self->path = path;
    self->count = count;
    self->ours = new_fork_flag();
    int error = self->ours != NULL ? hold(self, PyBytes_AS_STRING(path), &self->memory) : errno;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static bool
in_our_process(const JournalObject *self)
{
    return self->ours != NULL && *self->ours == 1;
}

/* The slots, until `leave`; NULL, and nothing to leave, in a child of a fork, where the address may be anything's by now,
 * and when the journal is closed. No Python code runs in between, so nobody waits for long. */
static Slot *
enter(JournalObject *self)
{
    for (;;) {
        if (!in_our_process(self)) {
            return NULL;
        }
        atomic_fetch_add(&self->users, 1);
        if (!atomic_load(&self->moving)) {
            break;
        }
        atomic_fetch_sub(&self->users, 1);
        sched_yield();
    }
    if (self->memory == NULL) {
        atomic_fetch_sub(&self->users, 1);
        return NULL;
    }
    return (Slot *)(self->memory + 1);
}

static void
leave(JournalObject *self)
{
    atomic_fetch_sub(&self->users, 1);
}

/* Puts other memory, with the same records, in place of the one there is; NULL: none. */
static void
replace_memory(JournalObject *self, Header *fresh)
{
    bool expected = false;
    while (!atomic_compare_exchange_weak(&self->moving, &expected, true)) {
        expected = false;
        sched_yield();
    }
    while (atomic_load(&self->users) != 0) {
        sched_yield();
    }
    if (self->memory != NULL) {
        if (fresh != NULL) {
            memcpy(fresh + 1, self->memory + 1, (size_t)self->count * sizeof(Slot));
        }
        munmap(self->memory, file_size(self->count));
    }
    self->memory = fresh;
    atomic_store(&self->moving, false);
}

bool
journal_is_ours(JournalObject *self)
{
    bool open = enter(self) != NULL;
    if (open) {
        leave(self);
    }
    return open;
}

static void
journal_dealloc(PyObject *op)
{
    JournalObject *self = (JournalObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (in_our_process(self) && self->memory != NULL) {
        munmap(self->memory, file_size(self->count));
    }
    if (self->ours != NULL) {
        munmap((void *)self->ours, (size_t)sysconf(_SC_PAGESIZE));
    }
    Py_CLEAR(self->path);
    type->tp_free(op);
    Py_DECREF(type);
}

/* ---- slots ---- */

#define STATE_WRITING 255 /* taken, not yet valid: nobody but its writer looks at it */

static char
kind_letter(Kind kind)
{
    return kind == KIND_SEMAPHORE ? 's' : kind == KIND_SHARED_MEMORY ? 'm' : 'q';
}

static void
set_identity(Slot *slot, const Identity *identity)
{
    slot->device = identity->device;
    slot->inode = identity->inode;
    slot->born = identity->born;
}

static int
take_slot(JournalObject *self, Slot *slots, SlotState state, const Slot *record)
{
    int start = atomic_load(&self->hint);
    for (int i = 0; i < self->count; i++) {
        int index = (start + i) % self->count;
        Slot *slot = &slots[index];
        uint8_t expected = SLOT_FREE;
        if (!atomic_compare_exchange_strong(&slot->state, &expected, STATE_WRITING)) {
            continue;
        }
        memcpy((char *)slot + sizeof(slot->state), (const char *)record + sizeof(slot->state),
               offsetof(Slot, name) - sizeof(slot->state) + record->name_length);
        atomic_store(&slot->state, (uint8_t)state);
        atomic_store(&self->hint, (index + 1) % self->count);
        return index;
    }
    return -1;
}

int
journal_add(JournalObject *self, SlotState state, Kind kind, const char *name, const Identity *identity, bool shared)
{
    size_t length = strlen(name);
    Slot record = {.kind = (uint8_t)kind_letter(kind), .shared = shared, .name_length = (uint16_t)length};
    if (length > sizeof(record.name)) {
        return -1;
    }
    memcpy(record.name, name, length);
    set_identity(&record, identity);
    Slot *slots = enter(self);
    if (slots == NULL) {
        return -1;
    }
    int index = take_slot(self, slots, state, &record);
    leave(self);
    return index;
}

/* A slot that is known to be taken, until `leave`. */
static Slot *
enter_slot(JournalObject *self, int index)
{
    Slot *slots = index >= 0 && index < self->count ? enter(self) : NULL;
    return slots != NULL ? &slots[index] : NULL;
}

void
journal_confirm(JournalObject *self, int index, const Identity *identity)
{
    Slot *slot = enter_slot(self, index);
    if (slot != NULL) {
        set_identity(slot, identity);
        atomic_store(&slot->state, SLOT_OWNED);
        leave(self);
    }
}

void
journal_remove(JournalObject *self, int index)
{
    Slot *slot = enter_slot(self, index);
    if (slot != NULL) {
        atomic_store(&slot->state, SLOT_FREE);
        atomic_store(&self->hint, index);
        leave(self);
    }
}

void
journal_share(JournalObject *self, int index)
{
    Slot *slot = enter_slot(self, index);
    if (slot != NULL) {
        slot->shared = 1;
        atomic_thread_fence(memory_order_seq_cst); /* before the pickle exists */
        leave(self);
    }
}

SlotState
journal_state(JournalObject *self, int index)
{
    SlotState state = SLOT_FREE;
    Slot *slot = enter_slot(self, index);
    if (slot != NULL) {
        state = (SlotState)atomic_load(&slot->state);
        leave(self);
    }
    return state;
}

/* ---- methods ---- */

static bool
in_place(const JournalObject *self)
{
    struct stat status;
    return lstat(PyBytes_AS_STRING(self->path), &status) == 0 && (uint64_t)status.st_dev == self->device &&
           (uint64_t)status.st_ino == self->inode;
}

PyDoc_STRVAR(in_place_doc,
"in_place($self, /)\n--\n\n"
"Does the path still lead to this journal? False when somebody wiped the directory.");

static PyObject *
journal_in_place(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(in_place((JournalObject *)op));
}

PyDoc_STRVAR(ready_doc,
"ready($self, lock, /)\n--\n\n"
"Is this journal open, in its place, and somebody alive who holds the file `lock`?");

static PyObject *
journal_ready(PyObject *op, PyObject *lock)
{
    JournalObject *self = (JournalObject *)op;
    PyObject *path;
    if (!journal_is_ours(self) || !in_place(self)) {
        Py_RETURN_FALSE;
    }
    if (!PyUnicode_FSConverter(lock, &path)) {
        return NULL;
    }
    bool locked = system_probe_lock(PyBytes_AS_STRING(path)) == 1;
    Py_DECREF(path);
    return PyBool_FromLong(locked);
}

PyDoc_STRVAR(move_to_doc,
"move_to($self, path, /)\n--\n\n"
"Go on in a new file of another path, with the same records.");

static PyObject *
journal_move_to(PyObject *op, PyObject *arg)
{
    JournalObject *self = (JournalObject *)op;
    PyObject *path;
    Header *fresh;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    int error = journal_is_ours(self) ? hold(self, PyBytes_AS_STRING(path), &fresh) : EBADF;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg);
        Py_DECREF(path);
        return NULL;
    }
    replace_memory(self, fresh);
    if (strcmp(PyBytes_AS_STRING(self->path), PyBytes_AS_STRING(path)) != 0) { /* else it is the new one by now */
        unlink(PyBytes_AS_STRING(self->path)); /* that it is gone already is why we are here, or none too bad */
    }
    PyObject *old = self->path;
    self->path = path;
    Py_DECREF(old);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Let go of the journal; what it records looks like left by a dead process then.");

static PyObject *
journal_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    JournalObject *self = (JournalObject *)op;
    if (in_our_process(self)) {
        replace_memory(self, NULL);
    }
    Py_RETURN_NONE;
}

static PyObject *
journal_get_ours(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(journal_is_ours((JournalObject *)op));
}

static PyObject *
journal_get_path(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(((JournalObject *)op)->path);
}

PyDoc_STRVAR(journal_doc,
"Journal(path, slots, /)\n--\n\n"
"A new file that records what this process owns, locked as long as exactly this process lives.\n\n"
"Raises OSError; BlockingIOError when another process holds a file of this name.");

static PyMethodDef journal_methods[] = {
    {"in_place", journal_in_place, METH_NOARGS, in_place_doc},
    {"ready", journal_ready, METH_O, ready_doc},
    {"move_to", journal_move_to, METH_O, move_to_doc},
    {"close", journal_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef journal_getset[] = {
    {"ours", journal_get_ours, NULL, PyDoc_STR("Is this the process that opened it, and is it open?"), NULL},
    {"path", journal_get_path, NULL, PyDoc_STR("bytes"), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot journal_slots[] = {
    {Py_tp_doc, (void *)journal_doc},
    {Py_tp_new, journal_new},
    {Py_tp_dealloc, journal_dealloc},
    {Py_tp_methods, journal_methods},
    {Py_tp_getset, journal_getset},
    {0, NULL},
};

/* Not garbage-collected: see semaphore_spec. */
PyType_Spec journal_spec = {
    .name = "posix_ipc._ext.Journal",
    .basicsize = sizeof(JournalObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = journal_slots,
};

#endif
