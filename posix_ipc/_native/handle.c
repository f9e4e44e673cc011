/* What the three handle types have in common: name, mode and identity, pickling, unlinking, and the pin that keeps a
 * kernel object open under a call that waits on it. */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if HAVE_MESSAGE_QUEUES
#include <mqueue.h>
#endif

/* ---- the head ---- */

void
named_swap(NamedObject *self, PyObject **name, PyObject **encoded, mode_t mode, const Identity *identity, bool owned,
           Tracking *tracking)
{
    PyObject *old_name = self->name, *old_encoded = self->encoded;
    Tracking old_tracking = self->tracking;
    self->name = *name;
    self->encoded = *encoded;
    self->mode = mode;
    self->identity = *identity;
    self->owned = owned;
    self->tracking = *tracking;
    *name = old_name;
    *encoded = old_encoded;
    *tracking = old_tracking;
}

void
named_drop(PyObject *name, PyObject *encoded, Tracking *tracking)
{
#if HAVE_TRACKING
    Py_XDECREF(tracking->record.journal);
#else
    (void)tracking;
#endif
    Py_XDECREF(name);
    Py_XDECREF(encoded);
}

void
named_set_origin(NamedObject *self, uint64_t tree, bool created_here)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    self->tracking.tree = tree;
    self->tracking.creator = created_here ? getpid() : 0;
    Py_END_CRITICAL_SECTION();
}

void
named_begin_dealloc(NamedObject *self)
{
    if (self->weak_references != NULL) {
        PyObject_ClearWeakRefs((PyObject *)self);
    }
}

void
named_end_dealloc(NamedObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    named_drop(self->name, self->encoded, &self->tracking);
    type->tp_free(self);
    Py_DECREF(type); /* an instance of a heap type holds a reference to it */
}

PyMemberDef named_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(NamedObject, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

void
named_get(NamedObject *self, PyObject **name, PyObject **encoded)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    Py_XINCREF(self->name);
    *name = self->name;
    if (encoded != NULL) {
        Py_XINCREF(self->encoded);
        *encoded = self->encoded;
    }
    Py_END_CRITICAL_SECTION();
}

PyObject *
named_get_name(PyObject *self, void *Py_UNUSED(closure))
{
    PyObject *name;
    named_get((NamedObject *)self, &name, NULL);
    return name != NULL ? name : Py_NewRef(Py_None);
}

PyObject *
named_get_mode(PyObject *op, void *Py_UNUSED(closure))
{
    NamedObject *self = (NamedObject *)op;
    mode_t mode;
    Py_BEGIN_CRITICAL_SECTION(self);
    mode = self->mode;
    Py_END_CRITICAL_SECTION();
    return PyLong_FromUnsignedLong(mode);
}

PyObject *
named_str(PyObject *self)
{
    PyObject *name;
    named_get((NamedObject *)self, &name, NULL);
    return name != NULL ? name : PyObject_Repr(self);
}

PyObject *
named_repr(NamedObject *self, const char *type, PyObject *rest)
{
    PyObject *name;
    mode_t mode;
    Py_BEGIN_CRITICAL_SECTION(self);
    name = self->name;
    Py_XINCREF(name);
    mode = self->mode;
    Py_END_CRITICAL_SECTION();
    if (name == NULL) {
        return PyUnicode_FromFormat("posix_ipc.%s(<not open>)", type);
    }
    char octal[16]; /* PyUnicode_FromFormat has no %o */
    PyOS_snprintf(octal, sizeof(octal), "0%o", (unsigned)mode);
    PyObject *result = PyUnicode_FromFormat("posix_ipc.%s(\"%U\", mode=%s%V", type, name, octal, rest, ")");
    Py_DECREF(name);
    return result;
}

PyObject *
named_raise(NamedObject *self, int error, const char *call, const char *reason)
{
    State *state = state_of((PyObject *)self);
    if (state == NULL) {
        return NULL;
    }
    PyObject *name;
    named_get(self, &name, NULL);
    if (error == EBADF) {
        raise_closed(state, call, name);
    }
    else if (error == EINTR) {
        raise_interrupted(state, call, name);
    }
    else {
        raise_errno(state, error, call, name, reason);
    }
    Py_XDECREF(name);
    return NULL;
}

/* ---- what is done by name, each kind in its own way ---- */

#if HAVE_MESSAGE_QUEUES
static int
unlink_queue(const char *name)
{
    int result = mq_unlink(name);
    if (result < 0 && errno == EINVAL) { /* a name without a slash in front, which no queue has */
        errno = ENOENT;
    }
    return result;
}
#endif

static const struct {
    const char *name; /* in audit events */
    const char *unlink_call;
    int (*unlink)(const char *);
} kinds[] = {
    [KIND_SEMAPHORE] = {"semaphore", "sem_unlink", sem_unlink},
    [KIND_SHARED_MEMORY] = {"shared_memory", "shm_unlink", shm_unlink},
#if HAVE_MESSAGE_QUEUES
    [KIND_MESSAGE_QUEUE] = {"message_queue", "mq_unlink", unlink_queue},
#endif
};

#if HAVE_TRACKING
int
object_path(Kind kind, const char *name, char path[SHM_PATH_SIZE])
{
    if (kind == KIND_SEMAPHORE) {
        return semaphore_file_path(name, path);
    }
    name += strspn(name, "/"); /* like the C library: "/a", "a" and "//a" are one segment */
    if (*name == '\0' || strchr(name, '/') != NULL) {
        return EINVAL;
    }
    if (strlen(name) > NAME_MAX) {
        return ENAMETOOLONG;
    }
    snprintf(path, SHM_PATH_SIZE, SHM_DIRECTORY "%s", name);
    return 0;
}
#endif

int
audit_open(Kind kind, int flags, PyObject *name)
{
    return PySys_Audit(flags & O_CREAT ? "posix_ipc.create" : "posix_ipc.open", "sO", kinds[kind].name, name);
}

int
audit_unlink(Kind kind, PyObject *name)
{
    return PySys_Audit("posix_ipc.unlink", "sO", kinds[kind].name, name);
}

/* Consumes both references. */
static PyObject *
unlink_encoded(State *state, PyObject *name, PyObject *encoded, Kind kind)
{
    int error;
    PyObject *result = NULL;
    if (audit_unlink(kind, name) < 0) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS /* the last name of a large segment frees its pages */
    error = kinds[kind].unlink(PyBytes_AS_STRING(encoded)) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
    result = error != 0 ? raise_errno(state, error, kinds[kind].unlink_call, name, NULL) : Py_NewRef(Py_None);
done:
    Py_DECREF(name);
    Py_DECREF(encoded);
    return result;
}

PyObject *
named_unlink(NamedObject *self, Kind kind)
{
    State *state = state_of((PyObject *)self);
    if (state == NULL) {
        return NULL;
    }
    PyObject *name, *encoded;
    named_get(self, &name, &encoded);
    if (name == NULL) {
        return raise_closed(state, kinds[kind].unlink_call, NULL);
    }
    return unlink_encoded(state, name, encoded, kind);
}

PyObject *
unlink_by_name(State *state, PyObject *arg, Kind kind)
{
    PyObject *name, *encoded;
    if (args_name(arg, &name, &encoded) < 0) {
        return NULL;
    }
    return unlink_encoded(state, name, encoded, kind);
}

/* ---- pickling ---- */

#if PY_VERSION_HEX < 0x030B0000
/* The value of an attribute, NULL without an exception where there is none. */
static int
get_optional(PyObject *self, const char *name, PyObject **value)
{
    *value = PyObject_GetAttrString(self, name);
    if (*value == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return 0;
    }
    return *value == NULL ? -1 : 0;
}

/* {slot: value} of the __slots__ that have a value; copyreg knows the mangled names. */
static PyObject *
slot_values(PyObject *self)
{
    PyObject *values = NULL, *names = NULL, *copyreg = PyImport_ImportModule("copyreg");
    if (copyreg != NULL) {
        names = PyObject_CallMethod(copyreg, "_slotnames", "O", (PyObject *)Py_TYPE(self));
        Py_DECREF(copyreg);
    }
    PyObject *iterator = names != NULL ? PyObject_GetIter(names) : NULL;
    Py_XDECREF(names);
    if (iterator == NULL || (values = PyDict_New()) == NULL) {
        Py_XDECREF(iterator);
        return NULL;
    }
    PyObject *name;
    while ((name = PyIter_Next(iterator)) != NULL) {
        PyObject *value = PyObject_GetAttr(self, name);
        if (value != NULL) {
            PyDict_SetItem(values, name, value);
            Py_DECREF(value);
        }
        else if (PyErr_ExceptionMatches(PyExc_AttributeError)) { /* a slot without a value */
            PyErr_Clear();
        }
        Py_DECREF(name);
        if (PyErr_Occurred()) {
            break;
        }
    }
    Py_DECREF(iterator);
    if (PyErr_Occurred()) {
        Py_CLEAR(values);
    }
    return values;
}

/* What object.__getstate__() returns from 3.11 on: the __dict__ or None, or that and the values of the slots. */
static PyObject *
default_state(PyObject *self)
{
    PyObject *attributes, *slots, *state;
    if (get_optional(self, "__dict__", &attributes) < 0) {
        return NULL;
    }
    if (attributes == NULL) {
        attributes = Py_NewRef(Py_None);
    }
    slots = slot_values(self);
    state = slots == NULL ? NULL : PyDict_GET_SIZE(slots) == 0 ? Py_NewRef(attributes)
                                                               : PyTuple_Pack(2, attributes, slots);
    Py_DECREF(attributes);
    Py_XDECREF(slots);
    return state;
}
#endif

/* What pickle restores behind the constructor: the __dict__, the __slots__, or what a subclass says. */
static PyObject *
pickled_state(PyObject *self)
{
#if PY_VERSION_HEX < 0x030B0000
    PyObject *method, *state;
    if (get_optional(self, "__getstate__", &method) < 0) {
        return NULL;
    }
    if (method == NULL) {
        return default_state(self);
    }
    state = PyObject_CallNoArgs(method);
    Py_DECREF(method);
    return state;
#else
    return PyObject_CallMethod(self, "__getstate__", NULL);
#endif
}

PyObject *
named_reduce(NamedObject *self, Kind kind, int options)
{
    State *state = state_of((PyObject *)self);
    if (state == NULL) {
        return NULL;
    }
    PyObject *name, *identity = NULL, *extra = NULL, *result = NULL;
    Identity raw;
    mode_t mode;
    Py_BEGIN_CRITICAL_SECTION(self);
    name = self->name;
    Py_XINCREF(name);
    raw = self->identity;
    mode = self->mode;
    options |= self->tracking.active ? OPTION_TRACKED : 0;
    Py_END_CRITICAL_SECTION();
    if (name == NULL) {
        return raise_closed(state, "__reduce__", NULL);
    }
    if (state->rebuild == NULL) {
        Py_DECREF(name);
        PyErr_SetString(PyExc_RuntimeError, "the interpreter is ending: nothing can be pickled any more");
        return NULL;
    }
    identity = identity_pack(state, &raw, kind);
    extra = identity != NULL ? pickled_state((PyObject *)self) : NULL;
    if (extra != NULL) {
        PyObject *type = (PyObject *)Py_TYPE(self);
        result = extra == Py_None
                     ? Py_BuildValue("O(OOOki)", state->rebuild, type, name, identity, (unsigned long)mode, options)
                     : Py_BuildValue("O(OOOki)O", state->rebuild, type, name, identity, (unsigned long)mode, options,
                                     extra);
    }
    Py_DECREF(name);
    Py_XDECREF(identity);
    Py_XDECREF(extra);
    return result;
}

/* ---- the pin ---- */

Handle *
handle_new(void (*release)(Handle *))
{
    Handle *handle = PyMem_Calloc(1, sizeof(Handle));
    if (handle == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    handle->release = release;
    return handle;
}

void
handle_free(Handle *handle)
{
    handle->release(handle);
    PyMem_Free(handle);
}

/* A fork leaves the threads of the parent behind, but not their count. */
static void
forget_other_process(Handle *handle)
{
    pid_t pid = getpid();
    if (handle->pid != pid) {
        handle->pid = pid;
        handle->users = 0;
    }
}

void
handle_pin(Handle *handle)
{
    forget_other_process(handle);
    handle->users++;
}

bool
handle_close(Handle *handle)
{
    handle->closed = true;
    if (handle->users != 0) {
        forget_other_process(handle);
    }
    return handle->users == 0;
}

void
handle_unpin(NamedObject *self, Handle *handle)
{
    bool last;
    Py_BEGIN_CRITICAL_SECTION(self);
    /* The process is that of handle_pin: between the two no Python code runs, so nobody forks in this thread. */
    handle->users--;
    last = handle->closed && handle->users == 0;
    Py_END_CRITICAL_SECTION();
    if (last) {
        handle_free(handle);
    }
}
