/* posix_ipc._ext.Journal: what a process owns, in a file that outlives it.
 *
 * The file is locked (flock) by an open file that only a mapping keeps open, and the mapping is not inherited by a fork:
 * so the lock is held exactly as long as this one process lives, whatever happens to its descriptors and children. Who
 * finds the lock free knows that the process is dead and reads in the file what it left.
 *
 * Slots are taken with a compare-and-swap and published by writing their state last, so that no instant of death leaves
 * a record that is half true, and neither threads nor finalizers need a lock. */
#include "ext.h"

#if HAVE_TRACKING

#include <errno.h>
#include <fcntl.h>
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
    _Atomic(Header *) memory; /* the file; not there in a child of a fork */
    _Atomic bool closed;      /* the memory is there, but no longer the file's */
    volatile char *ours;      /* a page that a fork wipes: 1 in the process that opened the journal, 0 in its children */
    int count;
    _Atomic int hint;      /* where a free slot may be */
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
    Header *memory;
    self->ours = new_fork_flag();
    int error = self->ours != NULL ? hold(self, PyBytes_AS_STRING(path), &memory) : errno;
    if (error == 0) {
        atomic_store(&self->memory, memory);
    }
    else {
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

/* NULL in a child of a fork, where the address may be anything's by now, and when the journal is closed. */
static Slot *
slots_of(JournalObject *self)
{
    Header *memory = in_our_process(self) && !atomic_load(&self->closed) ? atomic_load(&self->memory) : NULL;
    return memory != NULL ? (Slot *)(memory + 1) : NULL;
}

bool
journal_is_ours(JournalObject *self)
{
    return slots_of(self) != NULL;
}

/* Lets go of the file. Another thread may be writing a slot just now, without the interpreter lock: so the memory stays,
 * only that it is not the file's any more. */
static int
let_go(JournalObject *self)
{
    Header *memory = atomic_load(&self->memory);
    if (!in_our_process(self) || memory == NULL || atomic_exchange(&self->closed, true)) {
        return 0;
    }
    return mmap(memory, file_size(self->count), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
                   MAP_FAILED
               ? errno : 0;
}

static void
journal_dealloc(PyObject *op)
{
    JournalObject *self = (JournalObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    Header *memory = atomic_load(&self->memory);
    if (in_our_process(self) && memory != NULL) { /* in a child the address may be anything's by now */
        munmap(memory, file_size(self->count));
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

int
journal_add(JournalObject *self, SlotState state, Kind kind, const char *name, const Identity *identity, bool shared)
{
    size_t length = strlen(name);
    Slot *slots = slots_of(self);
    if (slots == NULL || length > sizeof(slots->name)) {
        return -1;
    }
    int start = atomic_load(&self->hint);
    for (int i = 0; i < self->count; i++) {
        int index = (start + i) % self->count;
        Slot *slot = &slots[index];
        uint8_t expected = SLOT_FREE;
        if (!atomic_compare_exchange_strong(&slot->state, &expected, STATE_WRITING)) {
            continue;
        }
        slot->kind = (uint8_t)kind_letter(kind);
        slot->shared = shared;
        slot->name_length = (uint16_t)length;
        memcpy(slot->name, name, length);
        set_identity(slot, identity);
        atomic_store(&slot->state, (uint8_t)state);
        atomic_store(&self->hint, (index + 1) % self->count);
        return index;
    }
    return -1;
}

static Slot *
slot_at(JournalObject *self, int index)
{
    Slot *slots = index >= 0 && index < self->count ? slots_of(self) : NULL;
    return slots != NULL ? &slots[index] : NULL;
}

void
journal_confirm(JournalObject *self, int index, const Identity *identity)
{
    Slot *slot = slot_at(self, index);
    if (slot != NULL) {
        set_identity(slot, identity);
        atomic_store(&slot->state, SLOT_OWNED);
    }
}

void
journal_remove(JournalObject *self, int index)
{
    Slot *slot = slot_at(self, index);
    if (slot != NULL) {
        atomic_store(&slot->state, SLOT_FREE);
        atomic_store(&self->hint, index);
    }
}

void
journal_share(JournalObject *self, int index)
{
    Slot *slot = slot_at(self, index);
    if (slot != NULL) {
        slot->shared = 1;
        atomic_thread_fence(memory_order_seq_cst); /* before the pickle exists */
    }
}

SlotState
journal_state(JournalObject *self, int index)
{
    Slot *slot = slot_at(self, index);
    return slot != NULL ? (SlotState)atomic_load(&slot->state) : SLOT_FREE;
}

/* ---- methods ---- */

PyDoc_STRVAR(in_place_doc,
"in_place($self, /)\n--\n\n"
"Does the path still lead to this journal? False when somebody wiped the directory.");

static PyObject *
journal_in_place(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    JournalObject *self = (JournalObject *)op;
    struct stat status;
    return PyBool_FromLong(lstat(PyBytes_AS_STRING(self->path), &status) == 0 &&
                           (uint64_t)status.st_dev == self->device && (uint64_t)status.st_ino == self->inode);
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
    Slot *slots = slots_of(self);
    int error = slots != NULL ? hold(self, PyBytes_AS_STRING(path), &fresh) : EBADF;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg);
        Py_DECREF(path);
        return NULL;
    }
    memcpy(fresh + 1, slots, (size_t)self->count * sizeof(Slot));
    atomic_store(&self->memory, fresh);
    unlink(PyBytes_AS_STRING(self->path)); /* that the old one is gone already is why we are here, or none too bad */
    PyObject *old = self->path;
    self->path = path;
    Py_DECREF(old);
    /* The old memory stays mapped: another thread may be writing there. */
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Let go of the journal; what it records looks like left by a dead process then.");

static PyObject *
journal_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int error = let_go((JournalObject *)op);
    if (error != 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
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
