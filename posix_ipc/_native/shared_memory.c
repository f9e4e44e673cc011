/* posix_ipc.SharedMemory: shm_open(3), ftruncate(2). */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    NamedObject head; /* the identity is asked for when it is needed first: most segments are never pickled */
    int descriptor; /* -1: closed, or never opened */
    bool read_only;
} SharedMemoryObject;

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
    PyTypeObject *type = Py_TYPE(op);
    drop_descriptor(self->descriptor, &self->head.identity, self->head.owned);
    named_clear(&self->head);
    type->tp_free(op);
    Py_DECREF(type);
}

/* Puts an open segment into the object, in place of what it held before. Consumes all it is given. */
static void
install(SharedMemoryObject *self, int descriptor, bool read_only, PyObject *name, PyObject *encoded, mode_t mode,
        const Identity *identity, bool owned)
{
    int old_descriptor;
    bool old_owned;
    Identity old_identity;
    Py_BEGIN_CRITICAL_SECTION(self);
    old_descriptor = self->descriptor;
    old_owned = self->head.owned;
    old_identity = self->head.identity;
    self->descriptor = descriptor;
    self->read_only = read_only;
    named_swap(&self->head, &name, &encoded, mode, identity, owned);
    Py_END_CRITICAL_SECTION();
    drop_descriptor(old_descriptor, &old_identity, old_owned);
    Py_XDECREF(name);
    Py_XDECREF(encoded);
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
    /* results */
    int descriptor;
    bool created;
    const char *failed; /* the call that did */
} OpenRequest;

/* 0 or an errno. Tells, as shm_open alone does not, whether the segment is new. */
static int
open_or_create(OpenRequest *request)
{
    int access = (request->read_only ? O_RDONLY : O_RDWR) | NEVER_WAIT;
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
        request->descriptor = shm_open(request->name, access | truncate, 0);
        if (request->descriptor >= 0) {
            return 0;
        }
        if (errno != ENOENT || !(request->flags & O_CREAT)) {
            return errno;
        }
    }
}

static int
resize(OpenRequest *request)
{
    request->failed = "ftruncate";
    if (request->size == 0) {
        return 0;
    }
    if (ftruncate(request->descriptor, (off_t)request->size) < 0) {
        return errno;
    }
    if ((request->flags & O_TRUNC) && !request->created &&
        (ftruncate(request->descriptor, 0) < 0 || ftruncate(request->descriptor, (off_t)request->size) < 0)) {
        return errno;
    }
    return 0;
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
    static const char *const names[] = {"name", "flags", "mode", "size", "read_only"};
    static const Signature signature = {"SharedMemory", 5, 1, names};
    PyObject *bound[5];
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
        args_bool(bound[4], "read_only", &request.read_only) < 0) {
        goto done;
    }
    if (request.size > 0 && request.read_only) {
        PyErr_SetString(PyExc_ValueError, "size: a segment cannot be resized through a read_only handle");
        goto done;
    }
    do {
        Py_CLEAR(name);
        Py_CLEAR(encoded);
        if (args_name_for(bound[0], request.flags, &name, &encoded) < 0) {
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
    install((SharedMemoryObject *)op, request.descriptor, request.read_only, name, encoded, request.mode, &unknown, false);
    name = encoded = NULL;
    result = 0;
done:
    Py_XDECREF(name);
    Py_XDECREF(encoded);
    args_release(&signature, bound);
    return result;
}

int
shared_memory_reopen(State *state, PyObject *op, PyObject *arg, mode_t mode, int options, const Identity *wanted)
{
    PyObject *name, *encoded;
    OpenRequest request = {.read_only = options & OPTION_READ_ONLY};
    FileFacts facts;
    int error;
    if (args_name(arg, &name, &encoded) < 0) {
        return -1;
    }
    request.name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    error = open_segment(&request);
    Py_END_ALLOW_THREADS
    if (error == ENOENT) {
        identity_raise_mismatch(state, wanted, NULL, KIND_SHARED_MEMORY, name);
        goto error;
    }
    if (error != 0) {
        raise_errno(state, error, request.failed, name, NULL);
        goto error;
    }
    if (identity_facts(request.descriptor, &facts) < 0) {
        raise_errno(state, errno, "fstat", name, NULL);
        close(request.descriptor);
        goto error;
    }
    if (!identity_same_object(wanted, &facts.identity)) {
        close(request.descriptor);
        identity_raise_mismatch(state, wanted, &facts.identity, KIND_SHARED_MEMORY, name);
        goto error;
    }
    install((SharedMemoryObject *)op, request.descriptor, request.read_only, name, encoded, mode, &facts.identity, true);
    return 0;
error:
    Py_DECREF(name);
    Py_DECREF(encoded);
    return -1;
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

PyDoc_STRVAR(close_fd_doc,
"close_fd($self, /)\n--\n\n"
"Close the descriptor. Memory that is mapped stays mapped; a second call does nothing.\n\n"
"This is not done when the object is collected, unless it was made by unpickling or copying. Raises ValueError if the\n"
"descriptor was closed behind this object's back.\n\n"
"POSIX.1-2008: close().");

static PyObject *
shared_memory_close_fd(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    int descriptor, error = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    descriptor = self->descriptor;
    self->descriptor = -1;
    Py_END_CRITICAL_SECTION();
    if (descriptor < 0) {
        Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS /* the last descriptor of an unlinked segment frees its pages */
    error = close(descriptor) < 0 && errno != EINTR ? errno : 0; /* EINTR: closed all the same */
    Py_END_ALLOW_THREADS
    if (error == EBADF) {
        return PyErr_Format(PyExc_ValueError, "close(%d): the descriptor of %R was closed by somebody else", descriptor,
                            op);
    }
    return error != 0 ? named_raise(&self->head, error, "close", NULL) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(unlink_doc,
"unlink($self, /)\n--\n\n"
"Remove the name. The memory itself goes when the last process has unmapped and closed it.\n\n"
"Works after close_fd() too. Raises ExistentialError when the name is gone already, PermissionsError.\n\n"
"POSIX.1-2008: shm_unlink().");

static PyObject *
shared_memory_unlink(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return named_unlink((NamedObject *)self, "shm_unlink", shm_unlink);
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

/* ---- getters ---- */

static PyObject *
shared_memory_get_fd(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(read_descriptor(self));
}

static PyObject *
shared_memory_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    SharedMemoryObject *self = (SharedMemoryObject *)op;
    struct stat status;
    int error;
    Py_BEGIN_CRITICAL_SECTION(self); /* fstat does not wait; outside, another thread could close the descriptor */
    error = fstat(self->descriptor, &status) < 0 ? errno : 0; /* EBADF for -1 */
    Py_END_CRITICAL_SECTION();
    return error != 0 ? named_raise(&self->head, error, "fstat", NULL) : PyLong_FromLongLong(status.st_size);
}

PyDoc_STRVAR(shared_memory_doc,
"SharedMemory(name, flags=0, mode=0o600, size=0, read_only=False)\n--\n\n"
"A handle on a named segment of memory that processes share.\n\n"
"name: str or bytes, \"/\" and up to 255 bytes without another slash; None, with O_CREX, takes a random unused name.\n"
"flags: 0 opens what exists, O_CREAT creates what does not, O_CREX only creates, O_TRUNC empties what exists.\n"
"mode: the permissions of a new segment, less the umask.\n"
"size: bytes; above 0 it resizes the segment, a new one and an existing one alike. A process that touches what another\n"
"one cut off is killed by SIGBUS.\n"
"read_only: open for reading only; not to be combined with a size.\n\n"
"Map it with mmap.mmap(segment.fd, segment.size). The segment outlives its handles and processes until it is unlinked.\n"
"Handles may be used from several threads at once, and pickled: that is by name.\n\n"
"Raises ExistentialError (no such segment, or with O_CREX: it exists), PermissionsError, ValueError (a name, size or\n"
"combination that cannot be), TypeError, OSError (descriptors, inodes or memory exhausted). After a failure an existing\n"
"segment is as it was, and a new one is gone.\n\n"
"POSIX.1-2008: shm_open(), ftruncate().");

static PyMethodDef shared_memory_methods[] = {
    {"fileno", shared_memory_fileno, METH_NOARGS, fileno_doc},
    {"close_fd", shared_memory_close_fd, METH_NOARGS, close_fd_doc},
    {"unlink", shared_memory_unlink, METH_NOARGS, unlink_doc},
    {"__reduce__", shared_memory_reduce, METH_NOARGS, reduce_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef shared_memory_getset[] = {
    {"name", named_get_name, NULL, PyDoc_STR("The name as given to the constructor; str."), NULL},
    {"mode", named_get_mode, NULL, PyDoc_STR("The permissions as given to the constructor; int."), NULL},
    {"fd", shared_memory_get_fd, NULL,
     PyDoc_STR("The descriptor of the segment, close-on-exec; -1 after close_fd()."), NULL},
    {"size", shared_memory_get_size, NULL,
     PyDoc_STR("The size of the segment at this instant, in bytes; int. POSIX.1-2008: fstat()."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot shared_memory_slots[] = {
    {Py_tp_doc, (void *)shared_memory_doc},
    {Py_tp_new, shared_memory_new},
    {Py_tp_init, shared_memory_init},
    {Py_tp_dealloc, shared_memory_dealloc},
    {Py_tp_repr, shared_memory_repr},
    {Py_tp_str, named_str},
    {Py_tp_methods, shared_memory_methods},
    {Py_tp_getset, shared_memory_getset},
    {0, NULL},
};

/* Not garbage-collected: see semaphore_spec. */
PyType_Spec shared_memory_spec = {
    .name = "posix_ipc.SharedMemory",
    .basicsize = sizeof(SharedMemoryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = shared_memory_slots,
};
