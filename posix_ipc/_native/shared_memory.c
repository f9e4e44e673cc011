/* posix_ipc.SharedMemory: shm_open(3), ftruncate(2). */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The segment in this process's memory. A view outlives the handle's interest in it: when the segment has been resized,
 * or close() was called, the handle lets go, and the last view takes the mapping with it. */
typedef struct Mapping {
    void *address;
    size_t size;
    size_t users;         /* the handle, and each export */
    bool lent;            /* somebody may hold the address who holds nothing but the handle: see Export */
    struct Mapping *next; /* among the handle's retired ones */
} Mapping;

typedef struct {
    NamedObject head; /* a constructor does not ask for the identity, pickling does: most segments are never pickled */
    int descriptor;   /* -1: closed, or never opened */
    Mapping *mapping; /* NULL until somebody looks at the memory */
    Mapping *retired; /* lent ones that were let go of; they stay as long as the handle */
    bool read_only;
} SharedMemoryObject;

/* What a view holds, as its `obj`, instead of the handle. numpy.ndarray(buffer=segment.buf) and torch.frombuffer(segment)
 * release their view at once and keep its `obj` for as long as they use the address: this one keeps the mapping too.
 * numpy.ndarray(buffer=segment) keeps nothing but the handle, so what it asked for is lent: mapped while there is one. */
typedef struct {
    PyObject_HEAD
    SharedMemoryObject *owner;
    Mapping *mapping;
} ExportObject;

/* ---- mapping ---- */

/* NULL with errno. */
static Mapping *
mapping_new(int descriptor, size_t size, bool read_only)
{
    Mapping *mapping = PyMem_RawMalloc(sizeof(*mapping));
    if (mapping == NULL) {
        errno = ENOMEM;
        return NULL;
    }
    mapping->address = mmap(NULL, size, read_only ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapping->address == MAP_FAILED) {
        int error = errno;
        PyMem_RawFree(mapping);
        errno = error;
        return NULL;
    }
    mapping->size = size;
    mapping->users = 1;
    mapping->lent = false;
    mapping->next = NULL;
    return mapping;
}

/* In the critical section: true when the caller was the last user, who frees it outside. */
static bool
mapping_leave(Mapping *mapping)
{
    return mapping != NULL && --mapping->users == 0;
}

/* In the critical section: the handle loses its interest in the mapping; returns it if the caller is to free it. */
static Mapping *
retire_mapping(SharedMemoryObject *self)
{
    Mapping *mapping = self->mapping;
    self->mapping = NULL;
    if (mapping != NULL && mapping->lent) {
        mapping->next = self->retired;
        self->retired = mapping;
        return NULL;
    }
    return mapping_leave(mapping) ? mapping : NULL;
}

static void
mapping_free(Mapping *mapping)
{
    Py_BEGIN_ALLOW_THREADS /* as many page tables to take apart as the segment has pages */
    munmap(mapping->address, mapping->size);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(mapping);
}

static void
leave_mapping(SharedMemoryObject *self, Mapping *mapping)
{
    bool last;
    Py_BEGIN_CRITICAL_SECTION(self);
    last = mapping_leave(mapping);
    Py_END_CRITICAL_SECTION();
    if (last) {
        mapping_free(mapping);
    }
}

/* ---- lifetime ---- */

static PyObject *
shared_memory_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    PyObject *self = type->tp_alloc(type, 0); /* arguments are the concern of __init__: see semaphore_new */
    if (self != NULL) {
        ((SharedMemoryObject *)self)->descriptor = -1;
    }
    return self;
}

/* What a collected or replaced handle held. A constructor's descriptor is the caller's, who may have passed its number
 * on; one from a pickle goes, unless somebody closed it already and the number leads to another object now. (That it
 * leads to the same one through another handle cannot be told from here.) */
static void
drop_descriptor(int descriptor, const Identity *identity, bool owned)
{
    if (descriptor >= 0 && owned && identity_leads_to(descriptor, identity)) {
        close(descriptor);
    }
}

static void
shared_memory_dealloc(PyObject *op)
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    named_begin_dealloc(&self->head);
    /* The views are gone: each of them kept this object alive. */
    if (self->mapping != NULL) {
        mapping_free(self->mapping);
    }
    while (self->retired != NULL) {
        Mapping *mapping = self->retired;
        self->retired = mapping->next;
        mapping_free(mapping);
    }
    drop_descriptor(self->descriptor, &self->head.identity, self->head.owned);
    named_end_dealloc(&self->head);
}

/* Puts an open segment into the object, in place of what it held before. Consumes all it is given. */
static void
install(SharedMemoryObject *self, int descriptor, bool read_only, PyObject *name, PyObject *encoded, mode_t mode,
        const Identity *identity, bool owned, Tracking tracking)
{
    int old_descriptor;
    bool old_owned;
    Identity old_identity;
    Mapping *unused;
    Py_BEGIN_CRITICAL_SECTION(self);
    unused = retire_mapping(self);
    old_descriptor = self->descriptor;
    old_owned = self->head.owned;
    old_identity = self->head.identity;
    self->descriptor = descriptor;
    self->read_only = read_only;
    named_swap(&self->head, &name, &encoded, mode, identity, owned, &tracking);
    Py_END_CRITICAL_SECTION();
    drop_descriptor(old_descriptor, &old_identity, old_owned);
    if (unused != NULL) {
        mapping_free(unused);
    }
    named_drop(name, encoded, &tracking);
}

#if defined(__linux__)
#define NEVER_WAIT O_NONBLOCK /* means nothing for a segment, but somebody may have put a FIFO in its place */
#else
#define NEVER_WAIT 0 /* not among the flags that POSIX lets shm_open have */
#endif

typedef struct {
    const char *name;
    int flags;
    mode_t mode;
    int64_t size;
    bool read_only;
    bool reserve;
    /* results */
    int descriptor;
    bool created;
    const char *failed; /* the call that did */
} OpenRequest;

/* 0 or an errno. Tells, as shm_open alone does not, whether the segment is new. */
static int
open_or_create(OpenRequest *request)
{
    int access = request->read_only ? O_RDONLY : O_RDWR;
    /* Emptying waits until the new size is known to be possible. */
    int truncate = request->size == 0 ? request->flags & O_TRUNC : 0;
    request->failed = "shm_open";
    for (;;) {
        if (request->flags & O_CREAT) {
            request->descriptor = shm_open(request->name, access | O_CREAT | O_EXCL, request->mode);
            if (request->descriptor >= 0) {
                request->created = true;
                return 0;
            }
            if (errno != EEXIST || (request->flags & O_EXCL)) {
                return errno;
            }
        }
        request->descriptor = shm_open(request->name, access | truncate | NEVER_WAIT, 0);
        if (request->descriptor >= 0) {
            if (NEVER_WAIT != 0 && fcntl(request->descriptor, F_SETFL, 0) < 0) { /* everybody sees the flags */
                int error = errno;
                request->failed = "fcntl";
                close(request->descriptor);
                return error;
            }
            return 0;
        }
        if (errno != ENOENT || !(request->flags & O_CREAT)) {
            return errno;
        }
    }
}

/* Allocates every page up to the size, and makes the segment that long if it is shorter; all of it or nothing. */
static int
reserve(OpenRequest *request)
{
    if (!request->reserve) {
        return 0;
    }
    request->failed = "posix_fallocate";
    return shm_file_allocate(request->descriptor, (off_t)request->size);
}

static int
truncate_to(OpenRequest *request, int64_t size)
{
    request->failed = "ftruncate";
    return ftruncate(request->descriptor, (off_t)size) < 0 ? errno : 0;
}

/* What can fail comes before what changes an existing segment. */
static int
resize(OpenRequest *request)
{
    if (request->size == 0) {
        return 0;
    }
    int error = reserve(request);
    if (error == 0) {
        error = truncate_to(request, request->size);
    }
    if (error == 0 && (request->flags & O_TRUNC) && !request->created) {
        error = truncate_to(request, 0);
        if (error == 0) {
            error = truncate_to(request, request->size);
        }
        if (error == 0) {
            error = reserve(request); /* room for it there was a moment ago */
        }
    }
    return error;
}

/* Takes a segment away again that was just made here, unless its name has become another's in the meantime. */
static void
remove_created(OpenRequest *request)
{
    FileFacts made, named;
    if (identity_facts(request->descriptor, &made) == 0 && identity_of_segment(request->name, &named) == 0 &&
        identity_same_object(&made.identity, &named.identity)) {
        shm_unlink(request->name);
    }
}

/* 0 or an errno; on failure an existing segment is as it was and a new one is gone. */
static int
open_segment(OpenRequest *request)
{
    int error = open_or_create(request);
    if (error != 0) {
        return error;
    }
    error = resize(request);
    if (error != 0) {
        if (request->created) {
            remove_created(request);
        }
        close(request->descriptor);
    }
    return error;
}

static int
shared_memory_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"name", "flags", "mode", "size", "read_only", "reserve"};
    static const Signature signature = {"SharedMemory", names, 6, 1, 5};
    PyObject *bound[6];
    State *state = state_of(op);
    if (state == NULL || args_bind_init(&signature, args, kwargs, bound) < 0) {
        return -1;
    }
    int result = -1, error;
    PyObject *name = NULL, *encoded = NULL;
    OpenRequest request = {.mode = 0600};
    static const Identity unknown;
    if (args_flags(bound[1], &request.flags) < 0 || args_mode(bound[2], &request.mode) < 0 ||
        args_integer(bound[3], "size", 0, INT64_MAX, &request.size) < 0 ||
        args_bool(bound[4], "read_only", &request.read_only) < 0 ||
        args_bool(bound[5], "reserve", &request.reserve) < 0) {
        goto done;
    }
    if (request.reserve && request.size == 0) {
        PyErr_SetString(PyExc_ValueError, "reserve: there is nothing to reserve without a size");
        goto done;
    }
    if (request.reserve && !HAVE_ALLOCATE) {
        raise_errno(state, ENOSYS, "posix_fallocate", NULL, "this system cannot reserve memory");
        goto done;
    }
    if (request.size > 0 && request.read_only) {
        PyErr_SetString(PyExc_ValueError, "size: a segment cannot be resized through a read_only handle");
        goto done;
    }
    do {
        Py_CLEAR(name);
        Py_CLEAR(encoded);
        if (args_name_for(bound[0], request.flags, &name, &encoded) < 0 ||
            audit_open(KIND_SHARED_MEMORY, request.flags, name) < 0) {
            goto done;
        }
        request.name = PyBytes_AS_STRING(encoded);
        Py_BEGIN_ALLOW_THREADS
        error = open_segment(&request);
        Py_END_ALLOW_THREADS
    } while (error == EEXIST && bound[0] == Py_None);
    if (error != 0) {
        raise_errno(state, error, request.failed, name, NULL);
        goto done;
    }
    install((SharedMemoryObject *)op, request.descriptor, request.read_only, name, encoded, request.mode, &unknown, false,
            (Tracking){.creator = request.created ? getpid() : 0});
    name = encoded = NULL;
    result = 0;
done:
    Py_XDECREF(name);
    Py_XDECREF(encoded);
    args_release(&signature, bound);
    return result;
}

/* 0 or an errno: opens what exists, of which `facts` tells; tracked, with a lease on what still has its name. */
static int
attach_segment(OpenRequest *request, bool tracked, FileFacts *facts)
{
    int error;
    do {
        error = open_segment(request);
        if (error != 0) {
            return error;
        }
#if HAVE_TRACKING
        if (tracked) {
            request->failed = "flock";
            error = lease_lock(request->descriptor);
        }
#endif
        if (error == 0 && identity_facts(request->descriptor, facts) < 0) {
            request->failed = "fstat";
            error = errno;
        }
        if (error == 0 && tracked && facts->links == 0) { /* removed between open and flock */
            error = ESTALE;
        }
        if (error != 0) {
            close(request->descriptor);
        }
    } while (error == ESTALE);
    return error;
}

/* Opens what exists, for a pickle (`wanted` is the object it must be) or, tracked, by its name alone. */
static int
attach(State *state, PyObject *op, PyObject *arg, mode_t mode, bool read_only, bool tracked, const Identity *wanted)
{
    PyObject *name, *encoded;
    OpenRequest request = {.read_only = read_only};
    Tracking tracking = {.active = tracked};
    FileFacts facts;
    int error;
    if (args_name(arg, &name, &encoded) < 0) {
        return -1;
    }
    if (audit_open(KIND_SHARED_MEMORY, 0, name) < 0) {
        goto error;
    }
    request.name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    error = attach_segment(&request, tracked, &facts);
    Py_END_ALLOW_THREADS
    if (error == ENOENT && wanted != NULL) {
        identity_raise_mismatch(state, wanted, NULL, KIND_SHARED_MEMORY, name);
        goto error;
    }
    if (error != 0) {
        raise_errno(state, error, request.failed, name, NULL);
        goto error;
    }
    if (wanted != NULL && !identity_same_object(wanted, &facts.identity)) {
        close(request.descriptor);
        identity_raise_mismatch(state, wanted, &facts.identity, KIND_SHARED_MEMORY, name);
        goto error;
    }
    install((SharedMemoryObject *)op, request.descriptor, request.read_only, name, encoded, mode, &facts.identity, true,
            tracking);
    return 0;
error:
    Py_DECREF(name);
    Py_DECREF(encoded);
    return -1;
}

int
shared_memory_reopen(State *state, PyObject *op, PyObject *name, mode_t mode, int options, const Identity *wanted)
{
    return attach(state, op, name, mode, options & OPTION_READ_ONLY, options & OPTION_TRACKED, wanted);
}

/* ---- methods ---- */

static int
read_descriptor(PyObject *op)
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    int descriptor;
    Py_BEGIN_CRITICAL_SECTION(self);
    descriptor = self->descriptor;
    Py_END_CRITICAL_SECTION();
    return descriptor;
}

PyDoc_STRVAR(fileno_doc,
"fileno($self, /)\n--\n\n"
"The descriptor of the segment, or -1 after close_fd(); the same as fd.");

static PyObject *
shared_memory_fileno(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(read_descriptor(self));
}

/* Takes the descriptor, and if asked for the mapping, out of the handle and closes them. 0 or an errno; EBADF also if
 * somebody closed the descriptor and its number became a stranger's, as far as the identity is known. */
static int
close_handle(SharedMemoryObject *self, bool mapping_too, int *descriptor)
{
    int error = 0;
    Mapping *unused = NULL;
    Identity identity;
    Py_BEGIN_CRITICAL_SECTION(self);
    identity = self->head.identity;
    *descriptor = self->descriptor;
    self->descriptor = -1;
    if (mapping_too) {
        unused = retire_mapping(self);
    }
    Py_END_CRITICAL_SECTION();
    if (unused != NULL) {
        mapping_free(unused);
    }
    if (*descriptor >= 0 && identity.inode != 0 && !identity_leads_to(*descriptor, &identity)) {
        error = EBADF;
    }
    else if (*descriptor >= 0) {
        Py_BEGIN_ALLOW_THREADS /* the last descriptor of an unlinked segment frees its pages */
        error = close(*descriptor) < 0 && errno != EINTR ? errno : 0; /* EINTR: closed all the same */
        Py_END_ALLOW_THREADS
    }
    return error;
}

static PyObject *
close_result(SharedMemoryObject *self, int error, int descriptor)
{
    if (error == EBADF) {
        return PyErr_Format(PyExc_ValueError, "close(%d): the descriptor of %R was closed by somebody else", descriptor,
                            self);
    }
    return error != 0 ? named_raise(&self->head, error, "close", NULL) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(close_fd_doc,
"close_fd($self, /)\n--\n\n"
"Close the descriptor. Memory that is mapped stays mapped, and buf goes on giving views of it; a second call does\n"
"nothing. close() lets go of both.\n\n"
"This is not done when the object is collected, unless it was made by unpickling or copying. Raises ValueError if the\n"
"descriptor was closed behind this object's back. If its number leads to another file by now, that one stays open; but a\n"
"handle made by a constructor cannot tell before it has been pickled, and closes it.\n\n"
"POSIX.1-2008: close().");

static PyObject *
shared_memory_close_fd(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int descriptor;
    int error = close_handle((SharedMemoryObject *)op, false, &descriptor);
    return close_result((SharedMemoryObject *)op, error, descriptor);
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Close the descriptor and let go of the memory; the segment lives on, and unlink() still works here.\n\n"
"Views of the memory stay usable, and take it with them when the last one goes. A second call does nothing. Raises\n"
"ValueError if the descriptor was closed behind this object's back; see close_fd().\n\n"
"POSIX.1-2008: close(), munmap().");

static PyObject *
shared_memory_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int descriptor;
    int error = close_handle((SharedMemoryObject *)op, true, &descriptor);
    return close_result((SharedMemoryObject *)op, error, descriptor);
}

PyDoc_STRVAR(enter_doc,
"__enter__($self, /)\n--\n\n"
"Return the segment.");

static PyObject *
shared_memory_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(self);
}

PyDoc_STRVAR(exit_doc,
"__exit__($self, /, *exc_info)\n--\n\n"
"Do close().");

static PyObject *
shared_memory_exit(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *result = shared_memory_close(self, NULL);
    if (result == NULL && nargs > 0 && args[0] != Py_None) { /* the block's exception is the news */
        PyErr_Clear();
        return Py_NewRef(Py_None);
    }
    return result;
}

PyDoc_STRVAR(unlink_doc,
"unlink($self, /)\n--\n\n"
"Remove the name. The memory itself goes when the last process has unmapped and closed it.\n\n"
"Works after close_fd() too. Raises ExistentialError when the name is gone already, PermissionsError.\n\n"
"POSIX.1-2008: shm_unlink().");

static PyObject *
shared_memory_unlink(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return named_unlink((NamedObject *)self, KIND_SHARED_MEMORY);
}

PyDoc_STRVAR(reduce_doc,
"__reduce__($self, /)\n--\n\n"
"Pickle by name: loading opens the same segment, and raises ExistentialError if the name leads to it no more.");

static PyObject *
shared_memory_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    FileFacts facts;
    int error = 0;
    bool read_only;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->head.identity.inode == 0 || self->descriptor < 0) {
        error = identity_facts(self->descriptor, &facts) < 0 ? errno : 0; /* EBADF for -1 */
        if (error == 0 && !S_ISREG(facts.mode)) {
            error = EBADF; /* somebody closed the descriptor and its number became a stranger's */
        }
        if (error == 0) {
            self->head.identity = facts.identity;
        }
    }
    read_only = self->read_only;
    Py_END_CRITICAL_SECTION();
    return error == 0 ? named_reduce(&self->head, KIND_SHARED_MEMORY, read_only ? OPTION_READ_ONLY : 0)
                      : named_raise(&self->head, error, "__reduce__", NULL);
}

static PyObject *
shared_memory_repr(PyObject *self)
{
    return named_repr((NamedObject *)self, "SharedMemory", NULL);
}

/* ---- tracked ---- */

#if HAVE_TRACKING

/* A segment with its size, its lease and its record, and only then with its name. 0 or an errno. */
static int
create_recorded(OpenRequest *request, FileFacts *facts, Tracking *tracking)
{
    char path[SHM_PATH_SIZE];
    ShmFile file;
    request->failed = "shm_open";
    int error = object_path(KIND_SHARED_MEMORY, request->name, path);
    if (error != 0) {
        return error;
    }
    if (tracking->record.journal == NULL) {
        return NO_SLOT;
    }
    if (shm_file_begin(&file, request->mode) < 0) {
        return errno;
    }
    request->descriptor = file.descriptor;
    request->created = true;
    error = resize(request);
    if (error == 0) {
        request->failed = "flock";
        error = lease_lock(file.descriptor);
    }
    if (error == 0 && identity_facts(file.descriptor, facts) < 0) {
        request->failed = "fstat";
        error = errno;
    }
    if (error == 0 && !(facts->mode & S_IRUSR)) { /* by the umask: nobody could clean it up */
        request->failed = "umask";
        error = EACCES;
    }
    if (error == 0) {
        error = record_add(&tracking->record, SLOT_OWNED, KIND_SHARED_MEMORY, request->name, &facts->identity);
    }
    if (error == 0) {
        if (shm_file_publish(&file, path, true) < 0) {
            request->failed = "shm_open";
            error = errno;
            record_remove(&tracking->record);
        }
        record_settle(&tracking->record);
    }
    if (error != 0) {
        shm_file_end(&file);
    }
    return error;
}

PyDoc_STRVAR(create_doc,
"_create($self, journal, name, mode, size, reserve, /)\n--\n\n"
"Create a segment that this process owns. False, with nothing made, if the journal is full, or None: then only the\n"
"arguments are looked at.");

static PyObject *
shared_memory_create(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    OpenRequest request = {.flags = O_CREAT | O_EXCL};
    Tracking tracking = {.active = true, .record = {.index = -1}};
    PyObject *name, *encoded;
    if (state == NULL ||
        tracked_create_arguments(state, args, 2, &tracking.record.journal, &name, &encoded, &request.mode) < 0) {
        return NULL;
    }
    FileFacts facts;
    int error = 0;
    if (args_integer(PyTuple_GET_ITEM(args, 3), "size", 0, INT64_MAX, &request.size) < 0 ||
        args_bool(PyTuple_GET_ITEM(args, 4), "reserve", &request.reserve) < 0 ||
        (tracking.record.journal != NULL && audit_open(KIND_SHARED_MEMORY, O_CREAT, name) < 0)) {
        goto error;
    }
    request.name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    error = create_recorded(&request, &facts, &tracking);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        if (error != NO_SLOT) {
            raise_errno(state, error, request.failed, name, NULL);
        }
        goto error;
    }
    Py_INCREF(tracking.record.journal);
    install((SharedMemoryObject *)op, request.descriptor, false, name, encoded, request.mode, &facts.identity, true,
            tracking);
    Py_RETURN_TRUE;
error:
    Py_DECREF(name);
    Py_DECREF(encoded);
    return error == NO_SLOT ? Py_NewRef(Py_False) : NULL;
}

PyDoc_STRVAR(attach_doc,
"_attach($self, name, mode, read_only, /)\n--\n\n"
"Open a segment that exists, with a lease.");

static PyObject *
shared_memory_attach(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    PyObject *name, *mode_arg, *read_only_arg;
    mode_t mode = 0;
    bool read_only = false;
    if (state == NULL || !PyArg_ParseTuple(args, "OOO:_attach", &name, &mode_arg, &read_only_arg) ||
        args_mode(mode_arg, &mode) < 0 || args_bool(read_only_arg, "read_only", &read_only) < 0) {
        return NULL;
    }
    return attach(state, op, name, mode, read_only, true, NULL) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
shared_memory_unlink_tracked(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return tracked_unlink_file((NamedObject *)self, KIND_SHARED_MEMORY);
}

#endif

/* ---- buffer ---- */

/* In the critical section: the size of the segment as it is now. 0 or an errno; EBADF: closed, by us or by somebody. */
static int
read_size(const SharedMemoryObject *self, int64_t *size)
{
    FileFacts facts;
    if (identity_facts(self->descriptor, &facts) < 0) { /* EBADF for -1 */
        return errno;
    }
    if (self->head.identity.inode != 0 && !identity_same_object(&facts.identity, &self->head.identity)) {
        return EBADF; /* a stranger's */
    }
    *size = facts.size;
    return 0;
}

/* In the critical section: the mapping of the segment as it is now, made anew after a resize. 0 or an errno; EINVAL: the
 * segment is empty. *unused is a mapping to free. */
static int
map_current(SharedMemoryObject *self, Mapping **unused)
{
    int64_t size = 0;
    if (self->descriptor < 0) { /* after close_fd() */
        return self->mapping != NULL ? 0 : EBADF;
    }
    int error = read_size(self, &size);
    if (error != 0) {
        return error;
    }
    if (size == 0) {
        return EINVAL;
    }
    if (self->mapping == NULL || self->mapping->size != (size_t)size) {
        Mapping *fresh = mapping_new(self->descriptor, (size_t)size, self->read_only);
        if (fresh == NULL) {
            return errno;
        }
        *unused = retire_mapping(self);
        self->mapping = fresh;
    }
    return 0;
}

static int
export_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(((ExportObject *)op)->owner);
    Py_VISIT(Py_TYPE(op));
    return 0;
}

static void
export_dealloc(PyObject *op)
{
    ExportObject *self = (ExportObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->mapping != NULL) {
        leave_mapping(self->owner, self->mapping);
    }
    Py_DECREF(self->owner);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot export_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("What views of a segment keep.")},
    {Py_tp_traverse, export_traverse},
    {Py_tp_dealloc, export_dealloc},
    {0, NULL},
};

/* Garbage-collected, unlike the handle: an object that keeps a view of itself is a cycle through here. */
PyType_Spec export_spec = {
    .name = "posix_ipc._ext._Export",
    .basicsize = sizeof(ExportObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = export_slots,
};

static int
shared_memory_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    Mapping *unused = NULL;
    bool read_only = false;
    int error;
    view->obj = NULL; /* what the protocol wants where a view is refused */
    State *state = state_of(op);
    ExportObject *export = state != NULL ? (ExportObject *)state->Export->tp_alloc(state->Export, 0) : NULL;
    if (export == NULL) {
        return -1;
    }
    export->owner = (SharedMemoryObject *)Py_NewRef(op);
    Py_BEGIN_CRITICAL_SECTION(self);
    error = map_current(self, &unused);
    if (error == 0) {
        export->mapping = self->mapping;
        export->mapping->users++;
        export->mapping->lent |= (flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS; /* so does numpy.ndarray ask */
        read_only = self->read_only;
    }
    Py_END_CRITICAL_SECTION();
    if (unused != NULL) {
        mapping_free(unused);
    }
    int result = -1;
    if (error != 0) {
        named_raise(&self->head, error, "mmap", error == EINVAL ? "the segment is empty" : NULL);
    }
    else {
        result = PyBuffer_FillInfo(view, (PyObject *)export, export->mapping->address,
                                   (Py_ssize_t)export->mapping->size, read_only, flags);
    }
    Py_DECREF(export);
    return result;
}

/* Never called, as the view's `obj` is another; but where it is missing, numpy.frombuffer keeps the handle alone. */
static void
shared_memory_releasebuffer(PyObject *Py_UNUSED(op), Py_buffer *Py_UNUSED(view))
{
}

/* ---- getters ---- */

static PyObject *
shared_memory_get_buf(PyObject *self, void *Py_UNUSED(closure))
{
    return PyMemoryView_FromObject(self); /* kept here, it would be a cycle that holds the memory until collected */
}

static PyObject *
shared_memory_get_fd(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(read_descriptor(self));
}

static PyObject *
shared_memory_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    int64_t size = 0;
    int error;
    Py_BEGIN_CRITICAL_SECTION(self); /* it does not wait; outside, another thread could close the descriptor */
    error = read_size(self, &size);
    Py_END_CRITICAL_SECTION();
    return error != 0 ? named_raise(&self->head, error, "fstat", NULL) : PyLong_FromLongLong(size);
}

PyDoc_STRVAR(shared_memory_doc,
"SharedMemory(name, flags=0, mode=0o600, size=0, read_only=False, *, reserve=False)\n--\n\n"
"A handle on a named segment of memory that processes share.\n\n"
"name: str or bytes, \"/\" and up to 255 bytes without another slash; None, with O_CREX, takes a random unused name.\n"
"flags: 0 opens what exists, O_CREAT creates what does not, O_CREX only creates, O_TRUNC empties what exists.\n"
"mode: the permissions of a new segment, less the umask.\n"
"size: bytes; above 0 it resizes the segment, a new one and an existing one alike. A process that touches what another\n"
"one cut off is killed by SIGBUS.\n"
"read_only: open for reading only; not to be combined with a size.\n"
"reserve: allocate the memory now, all of it, so that a full /dev/shm is an OSError (ENOSPC) here and not a SIGBUS at the\n"
"first write. Signals are held back meanwhile. Where the system cannot do that, such as macOS: OSError (ENOSYS).\n\n"
"The handle exports the memory as a buffer: segment.buf, memoryview(segment), numpy.frombuffer(segment); see also fd. It\n"
"is mapped when it is looked at first (ValueError if the segment is empty, ExistentialError if it is closed); a view made\n"
"after a resize has the new size, an older one keeps its own. `with segment:` does close() at the end. The segment\n"
"outlives its handles and processes until it is unlinked. Handles may be used from several threads at once, and pickled:\n"
"that is by name.\n\n"
"Raises ExistentialError (no such segment, or with O_CREX: it exists), PermissionsError, ValueError (a name, size or\n"
"combination that cannot be), TypeError, OSError (descriptors, inodes or memory exhausted). After a failure an existing\n"
"segment is as it was, and a new one is gone.\n\n"
"POSIX.1-2008: shm_open(), ftruncate(), posix_fallocate(), mmap().");

static PyMethodDef shared_memory_methods[] = {
    {"fileno", shared_memory_fileno, METH_NOARGS, fileno_doc},
    {"close_fd", shared_memory_close_fd, METH_NOARGS, close_fd_doc},
    {"close", shared_memory_close, METH_NOARGS, close_doc},
    {"unlink", shared_memory_unlink, METH_NOARGS, unlink_doc},
    {"__enter__", shared_memory_enter, METH_NOARGS, enter_doc},
    {"__exit__", (PyCFunction)(void (*)(void))shared_memory_exit, METH_FASTCALL, exit_doc},
    {"__reduce__", shared_memory_reduce, METH_NOARGS, reduce_doc},
#if HAVE_TRACKING
    {"_create", shared_memory_create, METH_VARARGS, create_doc},
    {"_attach", shared_memory_attach, METH_VARARGS, attach_doc},
    {"_unlink", shared_memory_unlink_tracked, METH_NOARGS, tracked_unlink_doc},
    TRACKED_METHODS
#endif
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef shared_memory_getset[] = {
    {"name", named_get_name, NULL, PyDoc_STR("The name as given to the constructor; str."), NULL},
    {"mode", named_get_mode, NULL, PyDoc_STR("The permissions as given to the constructor; int."), NULL},
    {"fd", shared_memory_get_fd, NULL,
     PyDoc_STR("The descriptor of the segment, close-on-exec; -1 after close_fd()."), NULL},
    {"size", shared_memory_get_size, NULL,
     PyDoc_STR("The size of the segment at this instant, in bytes; int. Raises ExistentialError after close_fd().\n"
               "\n"
               "POSIX.1-2008: fstat()."),
     NULL},
    {"buf", shared_memory_get_buf, NULL,
     PyDoc_STR("A new memoryview of the whole segment as it is now, in bytes; writable unless read_only.\n"
               "\n"
               "Raises ValueError when the segment is empty, ExistentialError when it would have to be mapped first and\n"
               "the descriptor is closed, OSError (address space exhausted).\n"
               "\n"
               "POSIX.1-2008: mmap()."),
     NULL},
#if HAVE_TRACKING
    TRACKED_GETSET
#endif
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot shared_memory_slots[] = {
    {Py_tp_doc, (void *)shared_memory_doc},
    {Py_tp_new, shared_memory_new},
    {Py_tp_init, shared_memory_init},
    {Py_tp_dealloc, shared_memory_dealloc},
    {Py_tp_repr, shared_memory_repr},
    {Py_tp_str, named_str},
    {Py_tp_members, named_members},
    {Py_tp_methods, shared_memory_methods},
    {Py_tp_getset, shared_memory_getset},
    {Py_bf_getbuffer, shared_memory_getbuffer},
    {Py_bf_releasebuffer, shared_memory_releasebuffer},
    {0, NULL},
};

/* Not garbage-collected: see semaphore_spec. */
PyType_Spec shared_memory_spec = {
    .name = "posix_ipc.SharedMemory",
    .basicsize = sizeof(SharedMemoryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = shared_memory_slots,
};
