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

#define STATE_WRITING 255 /* taken, not yet valid, or about to be freed: nobody but its writer looks at it */

/* All but the state. */
static void
copy_record(Slot *to, const Slot *from)
{
    memcpy((char *)to + sizeof(to->state), (const char *)from + sizeof(from->state),
           offsetof(Slot, name) - sizeof(from->state) + from->name_length);
}

/* A file that is locked and mapped. */
typedef struct {
    Header *memory;
    uint64_t device;
    uint64_t inode;
} Held;

struct JournalObject {
    PyObject_HEAD
    PyObject *path;         /* bytes */
    Header *memory;         /* the file, NULL when closed; not there in a child of a fork */
    _Atomic int users;      /* threads that are using the memory */
    _Atomic bool moving;    /* one is about to replace it */
    _Atomic int creating;   /* threads whose record is there and whose object is yet to be published */
    _Atomic bool replacing; /* one waits for these, and no other begins */
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
        /* Its mode whatever the umask: a journal that cannot be read would keep everything from being swept. */
        if (flock(descriptor, LOCK_EX | LOCK_NB) < 0 || fstat(descriptor, &status) < 0 ||
            fchmod(descriptor, 0600) < 0) {
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
map_file(int count, int descriptor, Held *held)
{
    struct stat status;
    size_t size = file_size(count);
    int error = shm_file_allocate(descriptor, (off_t)size); /* a full file system says so here, not by SIGBUS */
    if (error != 0) {
        return error;
    }
    if (fstat(descriptor, &status) < 0) {
        return errno;
    }
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) {
        return errno;
    }
    if (madvise(memory, size, MADV_DONTFORK) < 0) {
        error = errno;
        munmap(memory, size);
        return error;
    }
    *held = (Held){memory, (uint64_t)status.st_dev, (uint64_t)status.st_ino};
    return 0;
}

/* Holds a new file of this path and writes its header. 0 or an errno. */
static int
hold(int count, const char *path, Held *held)
{
    int descriptor = open_locked(path);
    if (descriptor < 0) {
        return errno;
    }
    int error = map_file(count, descriptor, held);
    if (error != 0) {
        unlink(path); /* ours: it is locked */
        close(descriptor);
        return error;
    }
    close(descriptor);
    Header *header = held->memory;
    header->version = VERSION;
    header->slot_size = sizeof(Slot);
    header->ipc_namespace = identity_ipc_namespace();
    atomic_thread_fence(memory_order_release); /* whoever finds no magic finds no header: see _journal.read */
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
    Held held;
    int error = self->ours != NULL ? hold(count, PyBytes_AS_STRING(path), &held) : errno;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
        Py_DECREF(self);
        return NULL;
    }
    self->memory = held.memory;
    self->device = held.device;
    self->inode = held.inode;
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

static void
wait_a_moment(void)
{
    const struct timespec pause = {0, 100000};
    (void)nanosleep(&pause, NULL);
}

bool
journal_hold(JournalObject *self)
{
    for (;;) {
        if (!in_our_process(self)) {
            return false;
        }
        atomic_fetch_add(&self->creating, 1);
        if (!atomic_load(&self->replacing)) {
            return true;
        }
        atomic_fetch_sub(&self->creating, 1);
        wait_a_moment();
    }
}

void
journal_release(JournalObject *self)
{
    atomic_fetch_sub(&self->creating, 1);
}

/* While nobody here uses the slots, but others may strike records out of both files: what they find in neither state they
 * looked for they look for again (_reaper.disown). Each record is in the new file before it leaves the old one, so that
 * it is always said somewhere. */
static void
move_slots(Slot *from, Slot *to, int count)
{
    for (int i = 0; i < count; i++) {
        uint8_t state = atomic_load(&from[i].state);
        if (state == SLOT_FREE || state == STATE_WRITING) { /* about to be struck out, or he who did it died */
            continue;
        }
        copy_record(&to[i], &from[i]);
        atomic_store(&to[i].state, state);
        if (!atomic_compare_exchange_strong(&from[i].state, &state, SLOT_FREE)) { /* struck out meanwhile */
            atomic_store(&to[i].state, SLOT_FREE);
        }
    }
}

/* Puts other memory, with the same records, in place of the one there is; NULL: none. Not while an object is between its
 * record and its name: to a sweep its record is then one of what is gone, and nobody would have a record of it. Called
 * without the interpreter lock, since a creation may take a while. */
static void
replace_memory(JournalObject *self, Header *fresh)
{
    bool expected = false;
    while (!atomic_compare_exchange_weak(&self->replacing, &expected, true)) {
        expected = false;
        wait_a_moment();
    }
    while (atomic_load(&self->creating) != 0) {
        wait_a_moment();
    }
    atomic_store(&self->moving, true);
    while (atomic_load(&self->users) != 0) {
        sched_yield();
    }
    if (self->memory != NULL) {
        if (fresh != NULL) {
            move_slots((Slot *)(self->memory + 1), (Slot *)(fresh + 1), self->count);
        }
        munmap(self->memory, file_size(self->count));
    }
    self->memory = fresh;
    atomic_store(&self->moving, false);
    atomic_store(&self->replacing, false);
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
        copy_record(slot, record);
        atomic_store(&slot->state, (uint8_t)state);
        atomic_store(&self->hint, (index + 1) % self->count);
        return index;
    }
    return -1;
}

static bool
is_of(const Slot *slot, const Identity *identity)
{
    return slot->device == identity->device && slot->inode == identity->inode && slot->born == identity->born;
}

/* One claim says all that several would. */
static int
find_claim(const JournalObject *self, const Slot *slots, const Identity *identity)
{
    for (int i = 0; i < self->count; i++) {
        if (atomic_load(&slots[i].state) == SLOT_CLAIM && is_of(&slots[i], identity)) {
            return i;
        }
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
    int index = state == SLOT_CLAIM ? find_claim(self, slots, identity) : -1;
    if (index < 0) {
        index = take_slot(self, slots, state, &record);
    }
    leave(self);
    return index;
}

/* The slot of an object, until `leave`; NULL if it is no longer its: see journal_remove. */
static Slot *
enter_slot(JournalObject *self, int index, const Identity *identity)
{
    Slot *slots = index >= 0 && index < self->count ? enter(self) : NULL;
    if (slots == NULL) {
        return NULL;
    }
    if (!is_of(&slots[index], identity)) {
        leave(self);
        return NULL;
    }
    return &slots[index];
}

void
journal_confirm(JournalObject *self, int index, const Identity *identity)
{
    static const Identity unknown;
    Slot *slot = enter_slot(self, index, &unknown);
    if (slot != NULL) {
        set_identity(slot, identity);
        atomic_store(&slot->state, SLOT_OWNED);
        leave(self);
    }
}

/* Frees a slot if it speaks of this object, whoever else may be about to free it and take it for another one. */
static bool
free_slot(Slot *slot, const Identity *identity)
{
    uint8_t state = atomic_load(&slot->state);
    if (state == SLOT_FREE || state == STATE_WRITING || !is_of(slot, identity) ||
        !atomic_compare_exchange_strong(&slot->state, &state, STATE_WRITING)) {
        return false;
    }
    bool freed = is_of(slot, identity); /* once more: nobody can change it now */
    atomic_store(&slot->state, freed ? (uint8_t)SLOT_FREE : state);
    return freed;
}

bool
journal_remove(JournalObject *self, int index, const Identity *identity)
{
    Slot *slot = enter_slot(self, index, identity);
    if (slot == NULL) {
        return false;
    }
    bool freed = free_slot(slot, identity);
    if (freed) {
        atomic_store(&self->hint, index);
    }
    leave(self);
    return freed;
}

/* The same in the file of any process of this user. 0 or an errno. */
static int
strike(const char *path, int index, const Identity *identity, bool *struck)
{
    struct stat status;
    size_t size = file_size(index + 1);
    int descriptor = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0) {
        return errno;
    }
    void *memory = MAP_FAILED;
    int error = fstat(descriptor, &status) < 0 ? errno : status.st_size < (off_t)size ? EINVAL : 0;
    if (error == 0) {
        memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        error = memory == MAP_FAILED ? errno : 0;
    }
    close(descriptor);
    if (error == 0) {
        *struck = free_slot((Slot *)((Header *)memory + 1) + index, identity);
        munmap(memory, size);
    }
    return error;
}

PyObject *
journal_strike(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *path;
    int index;
    unsigned long long device, inode, born;
    bool struck = false;
    if (!PyArg_ParseTuple(args, "O&i(KKK):_strike", PyUnicode_FSConverter, &path, &index, &device, &inode, &born)) {
        return NULL;
    }
    Identity identity = {.device = device, .inode = inode, .born = born};
    int error = index >= 0 ? strike(PyBytes_AS_STRING(path), index, &identity, &struck) : EINVAL;
    PyObject *result = PyBool_FromLong(struck);
    if (error != 0) {
        errno = error;
        Py_DECREF(result);
        result = PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    }
    Py_DECREF(path);
    return result;
}

void
journal_share(JournalObject *self, int index, const Identity *identity)
{
    Slot *slot = enter_slot(self, index, identity);
    if (slot != NULL) {
        slot->shared = 1;
        atomic_thread_fence(memory_order_seq_cst); /* before the pickle exists */
        leave(self);
    }
}

SlotState
journal_state(JournalObject *self, int index, const Identity *identity)
{
    SlotState state = SLOT_FREE;
    Slot *slot = enter_slot(self, index, identity);
    if (slot != NULL) {
        state = (SlotState)atomic_load(&slot->state);
        leave(self);
    }
    return state;
}

/* ---- methods ---- */

static bool
in_place(JournalObject *self)
{
    struct stat status;
    PyObject *path;
    uint64_t device, inode;
    Py_BEGIN_CRITICAL_SECTION(self); /* another thread may be moving it */
    path = Py_NewRef(self->path);
    device = self->device;
    inode = self->inode;
    Py_END_CRITICAL_SECTION();
    bool here = lstat(PyBytes_AS_STRING(path), &status) == 0 && (uint64_t)status.st_dev == device &&
                (uint64_t)status.st_ino == inode;
    Py_DECREF(path);
    return here;
}

PyDoc_STRVAR(in_place_doc,
"in_place($self, /)\n--\n\n"
"Does the path still lead to this journal? False when somebody wiped the directory.");

static PyObject *
journal_in_place(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(in_place((JournalObject *)op));
}

PyDoc_STRVAR(free_doc,
"free($self, slot, identity, /)\n--\n\n"
"Take back what a slot says of an object that is gone, unless it speaks of another one by now.");

static PyObject *
journal_free(PyObject *op, PyObject *args)
{
    int index;
    unsigned long long device, inode, born;
    if (!PyArg_ParseTuple(args, "i(KKK):free", &index, &device, &inode, &born)) {
        return NULL;
    }
    Identity identity = {.device = device, .inode = inode, .born = born};
    return PyBool_FromLong(journal_remove((JournalObject *)op, index, &identity));
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
    PyObject *path, *old;
    Held held;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    int error = journal_is_ours(self) ? hold(self->count, PyBytes_AS_STRING(path), &held) : EBADF;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg);
        Py_DECREF(path);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    replace_memory(self, held.memory);
    Py_END_ALLOW_THREADS
    Py_BEGIN_CRITICAL_SECTION(self);
    old = self->path;
    self->path = path;
    self->device = held.device;
    self->inode = held.inode;
    Py_END_CRITICAL_SECTION();
    if (strcmp(PyBytes_AS_STRING(old), PyBytes_AS_STRING(path)) != 0) { /* else it is the new one by now */
        unlink(PyBytes_AS_STRING(old)); /* that it is gone already is why we are here, or none too bad */
    }
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
        Py_BEGIN_ALLOW_THREADS
        replace_memory(self, NULL);
        Py_END_ALLOW_THREADS
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
    PyObject *path;
    Py_BEGIN_CRITICAL_SECTION(op);
    path = Py_NewRef(((JournalObject *)op)->path);
    Py_END_CRITICAL_SECTION();
    return path;
}

static PyObject *
journal_get_device(PyObject *op, void *Py_UNUSED(closure))
{
    uint64_t device;
    Py_BEGIN_CRITICAL_SECTION(op);
    device = ((JournalObject *)op)->device;
    Py_END_CRITICAL_SECTION();
    return PyLong_FromUnsignedLongLong(device);
}

PyDoc_STRVAR(journal_doc,
"Journal(path, slots, /)\n--\n\n"
"A new file that records what this process owns, locked as long as exactly this process lives.\n\n"
"Raises OSError; BlockingIOError when another process holds a file of this name.");

static PyMethodDef journal_methods[] = {
    {"in_place", journal_in_place, METH_NOARGS, in_place_doc},
    {"ready", journal_ready, METH_O, ready_doc},
    {"move_to", journal_move_to, METH_O, move_to_doc},
    {"free", journal_free, METH_VARARGS, free_doc},
    {"close", journal_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef journal_getset[] = {
    {"ours", journal_get_ours, NULL, PyDoc_STR("Is this the process that opened it, and is it open?"), NULL},
    {"path", journal_get_path, NULL, PyDoc_STR("bytes"), NULL},
    {"device", journal_get_device, NULL, PyDoc_STR("Of the file system that it is in; st_dev of stat(2)"), NULL},
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
