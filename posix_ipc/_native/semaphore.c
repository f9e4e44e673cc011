/* posix_ipc.Semaphore: sem_open(3), sem_wait(3), sem_post(3). */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>

typedef struct {
    NamedObject head;
    Handle *handle; /* NULL: closed, or never opened */
} SemaphoreObject;

/* ---- lifetime ---- */

static void
release_handle(Handle *handle)
{
    semaphore_file_close(handle->semaphore);
}

static PyObject *
semaphore_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    return type->tp_alloc(type, 0); /* subclasses have signatures of their own: arguments are __init__'s concern */
}

static void
semaphore_dealloc(PyObject *op)
{
    SemaphoreObject *self = (SemaphoreObject *)op;
    named_begin_dealloc(&self->head);
    /* Unlike a descriptor, nobody but this object can reach the mapping. */
    if (self->handle != NULL) {
        handle_free(self->handle);
    }
    named_end_dealloc(&self->head);
}

/* Puts an open semaphore into the object, in place of what it held before. Consumes all it is given. */
static void
install(SemaphoreObject *self, Handle *handle, PyObject *name, PyObject *encoded, mode_t mode,
        const Identity *identity, bool owned, Tracking tracking)
{
    Handle *old;
    bool unused = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    old = self->handle;
    unused = old != NULL && handle_close(old);
    self->handle = handle;
    named_swap(&self->head, &name, &encoded, mode, identity, owned, &tracking);
    Py_END_CRITICAL_SECTION();
    if (unused) {
        handle_free(old);
    }
    named_drop(name, encoded, &tracking);
}

/* 0 or an errno. */
static int
open_or_create(const char *name, int flags, mode_t mode, unsigned value, OpenedSemaphore *opened, bool *created)
{
    int error;
    *created = flags & O_CREAT && flags & O_EXCL;
    if (!(flags & O_CREAT)) {
        return semaphore_file_open(name, opened, false);
    }
    if (*created) {
        return semaphore_file_create(name, mode, value, opened, NULL);
    }
    do { /* somebody may create or unlink it between the two */
        error = semaphore_file_open(name, opened, false);
        *created = error == ENOENT;
        if (*created) {
            error = semaphore_file_create(name, mode, value, opened, NULL);
        }
    } while (error == EEXIST);
    return error;
}

static int
raise_open(State *state, int error, const OpenedSemaphore *opened, PyObject *name)
{
    if (error == EILSEQ) {
        raise_error(state->Error, EINVAL, name, "sem_open(%R): the file of this name is no semaphore, or is truncated",
                    name);
    }
    else {
        raise_errno(state, error, opened->failed, name, NULL);
    }
    return -1;
}

static int
semaphore_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"name", "flags", "mode", "initial_value"};
    static const Signature signature = {"Semaphore", names, 4, 1, 4};
    PyObject *bound[4];
    State *state = state_of(op);
    if (state == NULL || args_bind_init(&signature, args, kwargs, bound) < 0) {
        return -1;
    }
    int result = -1, flags = 0, error;
    mode_t mode = 0600;
    int64_t value = 0;
    PyObject *name = NULL, *encoded = NULL;
    Handle *handle = NULL;
    OpenedSemaphore opened;
    bool created;
    if (args_flags(bound[1], &flags) < 0 || args_mode(bound[2], &mode) < 0 ||
        args_integer(bound[3], "initial_value", 0, SEMAPHORE_VALUE_LIMIT, &value) < 0) {
        goto done;
    }
    handle = handle_new(release_handle);
    if (handle == NULL) {
        goto done;
    }
    do {
        Py_CLEAR(name);
        Py_CLEAR(encoded);
        if (args_name_for(bound[0], flags, &name, &encoded) < 0 || audit_open(KIND_SEMAPHORE, flags, name) < 0) {
            goto done;
        }
        Py_BEGIN_ALLOW_THREADS
        error = open_or_create(PyBytes_AS_STRING(encoded), flags, mode, (unsigned)value, &opened, &created);
        Py_END_ALLOW_THREADS
    } while (error == EEXIST && bound[0] == Py_None);
    if (error != 0) {
        raise_open(state, error, &opened, name);
        goto done;
    }
    handle->semaphore = opened.semaphore;
    install((SemaphoreObject *)op, handle, name, encoded, mode, &opened.identity, false,
            (Tracking){.creator = created ? getpid() : 0});
    handle = NULL;
    name = encoded = NULL;
    result = 0;
done:
    PyMem_Free(handle);
    Py_XDECREF(name);
    Py_XDECREF(encoded);
    args_release(&signature, bound);
    return result;
}

/* Opens what exists, for a pickle (`wanted` is the object it must be) or, tracked, by its name alone. */
static int
attach(State *state, PyObject *op, PyObject *arg, mode_t mode, bool tracked, const Identity *wanted)
{
    PyObject *name, *encoded;
    OpenedSemaphore opened;
    int error;
    if (args_name(arg, &name, &encoded) < 0) {
        return -1;
    }
    Handle *handle = handle_new(release_handle);
    if (handle == NULL || audit_open(KIND_SEMAPHORE, 0, name) < 0) {
        goto error;
    }
    Py_BEGIN_ALLOW_THREADS
    error = semaphore_file_open(PyBytes_AS_STRING(encoded), &opened, tracked);
    Py_END_ALLOW_THREADS
    if (error == ENOENT && wanted != NULL) {
        identity_raise_mismatch(state, wanted, NULL, KIND_SEMAPHORE, name);
        goto error;
    }
    if (error != 0) {
        raise_open(state, error, &opened, name);
        goto error;
    }
    if (wanted != NULL && !identity_same_object(wanted, &opened.identity)) {
        semaphore_file_close(opened.semaphore);
        identity_raise_mismatch(state, wanted, &opened.identity, KIND_SEMAPHORE, name);
        goto error;
    }
    handle->semaphore = opened.semaphore;
    install((SemaphoreObject *)op, handle, name, encoded, mode, &opened.identity, true,
            (Tracking){.active = tracked});
    return 0;
error:
    PyMem_Free(handle);
    Py_DECREF(name);
    Py_DECREF(encoded);
    return -1;
}

int
semaphore_reopen(State *state, PyObject *op, PyObject *name, mode_t mode, int options, const Identity *wanted)
{
    return attach(state, op, name, mode, options & OPTION_TRACKED, wanted);
}

/* ---- helpers ---- */

/* 0 or an errno. */
static int
wait_until(sem_t *semaphore, int64_t timeout)
{
    int result;
    if (timeout == FOREVER) {
        result = sem_wait(semaphore);
    }
    else {
#if !HAVE_SEM_TIMEDWAIT
        return ENOSYS;
#elif HAVE_SEM_CLOCKWAIT
        struct timespec deadline = clock_after(CLOCK_MONOTONIC, timeout);
        result = sem_clockwait(semaphore, CLOCK_MONOTONIC, &deadline);
#else
        struct timespec deadline = clock_after(CLOCK_REALTIME, timeout); /* moves when somebody sets the clock */
        result = sem_timedwait(semaphore, &deadline);
#endif
    }
    return result < 0 ? errno : 0;
}

static int
wait_pinned(SemaphoreObject *self, Handle *handle, int64_t timeout)
{
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = wait_until(handle->semaphore, timeout);
    Py_END_ALLOW_THREADS
    handle_unpin(&self->head, handle);
    return error;
}

/* Takes one permit: at once if there is one, which keeps the interpreter lock, else by waiting without it. */
static int
acquire(SemaphoreObject *self, int64_t timeout)
{
    int error = 0;
    Handle *pinned = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    Handle *handle = self->handle;
    if (handle == NULL) {
        error = EBADF;
    }
    else if (sem_trywait(handle->semaphore) < 0) {
        error = errno;
        if (error == EAGAIN && timeout != 0) {
            handle_pin(handle);
            pinned = handle;
        }
    }
    Py_END_CRITICAL_SECTION();
    if (pinned != NULL) {
        error = wait_pinned(self, pinned, timeout);
    }
    if (error == 0) {
        return 0;
    }
    const char *reason = error == EAGAIN      ? "the semaphore's value is 0"
                         : error == ETIMEDOUT ? "the semaphore's value stayed 0 until the timeout"
                                              : NULL;
    named_raise(&self->head, error, "sem_wait", reason);
    return -1;
}

static int
release(SemaphoreObject *self)
{
    int error = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->handle == NULL) {
        error = EBADF;
    }
    else if (sem_post(self->handle->semaphore) < 0) {
        error = errno;
    }
    Py_END_CRITICAL_SECTION();
    if (error == 0) {
        return 0;
    }
    named_raise(&self->head, error, "sem_post", NULL);
    return -1;
}

/* ---- methods ---- */

#if HAVE_SEM_CLOCKWAIT
#define CLOCK_OF_WAITS "a clock that nobody can set"
#define LIMITED_WAIT "POSIX.1-2024: sem_clockwait()."
#else
#define CLOCK_OF_WAITS "the clock of this system, and moved when that is set"
#define LIMITED_WAIT "POSIX.1-2008: sem_timedwait()."
#endif

PyDoc_STRVAR(acquire_doc,
"acquire($self, /, timeout=None)\n--\n\n"
"Take one permit: wait until the value is above 0, then lower it by 1.\n\n"
"timeout: the longest wait in seconds, measured by " CLOCK_OF_WAITS "; None waits for ever, 0 never waits.\n"
"Raises BusyError when the time is over, SignalError when a signal arrives during the wait (the exception of its\n"
"handler is the cause; KeyboardInterrupt passes through), ExistentialError when this handle is closed, TypeError for a\n"
"timeout that is negative or no number. Other threads run during the wait. If the process that holds the last permit\n"
"is killed, nobody returns it.\n\n"
"POSIX.1-2008: sem_wait(), sem_trywait(); " LIMITED_WAIT);

static PyObject *
semaphore_acquire(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"timeout"};
    static const Signature signature = {"acquire", names, 1, 0, 1};
    int64_t timeout = FOREVER;
    if (nargs != 0 || kwnames != NULL) {
        PyObject *bound[1];
        if (args_bind(&signature, args, nargs, kwnames, bound) < 0 || args_timeout(bound[0], &timeout) < 0) {
            return NULL;
        }
    }
    if (acquire((SemaphoreObject *)self, timeout) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(release_doc,
"release($self, /)\n--\n\n"
"Give one permit back: raise the value by 1, and wake one of those who wait.\n\n"
"Raises OSError (EOVERFLOW) beyond SEMAPHORE_VALUE_MAX, ExistentialError when this handle is closed.\n\n"
"POSIX.1-2008: sem_post().");

static PyObject *
semaphore_release(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (release((SemaphoreObject *)self) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(enter_doc,
"__enter__($self, /)\n--\n\n"
"Take one permit, waiting as long as it takes, and return the semaphore.");

static PyObject *
semaphore_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return acquire((SemaphoreObject *)self, FOREVER) < 0 ? NULL : Py_NewRef(self);
}

PyDoc_STRVAR(exit_doc,
"__exit__($self, /, *exc_info)\n--\n\n"
"Give the permit back. Nothing is closed or unlinked.");

static PyObject *
semaphore_exit(PyObject *self, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return semaphore_release(self, NULL);
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Let go of the semaphore; it lives on, and unlink() still works here.\n\n"
"A thread that waits on this handle goes on waiting, safely. Raises ExistentialError the second time.\n\n"
"POSIX.1-2008: sem_close().");

static PyObject *
semaphore_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    SemaphoreObject *self = (SemaphoreObject *)op;
    Handle *handle;
    bool unused = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    handle = self->handle;
    self->handle = NULL;
    unused = handle != NULL && handle_close(handle);
    Py_END_CRITICAL_SECTION();
    if (handle == NULL) {
        return named_raise(&self->head, EBADF, "sem_close", NULL);
    }
    if (unused) {
        handle_free(handle);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unlink_doc,
"unlink($self, /)\n--\n\n"
"Remove the name. The semaphore itself goes when the last process has closed it.\n\n"
"Raises ExistentialError when the name is gone already, PermissionsError.\n\n"
"POSIX.1-2008: sem_unlink().");

static PyObject *
semaphore_unlink(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return named_unlink((NamedObject *)self, KIND_SEMAPHORE);
}

PyDoc_STRVAR(reduce_doc,
"__reduce__($self, /)\n--\n\n"
"Pickle by name: loading opens the same semaphore, and raises ExistentialError if the name leads to it no more.");

static PyObject *
semaphore_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    SemaphoreObject *self = (SemaphoreObject *)op;
    bool open;
    Py_BEGIN_CRITICAL_SECTION(self);
    open = self->handle != NULL;
    Py_END_CRITICAL_SECTION();
    return open ? named_reduce(&self->head, KIND_SEMAPHORE, 0) : named_raise(&self->head, EBADF, "__reduce__", NULL);
}

static PyObject *
semaphore_repr(PyObject *self)
{
    return named_repr((NamedObject *)self, "Semaphore", NULL);
}

/* ---- tracked ---- */

#if HAVE_TRACKING

PyDoc_STRVAR(create_doc,
"_create($self, journal, name, mode, initial_value, /)\n--\n\n"
"Create a semaphore that this process owns. False, with nothing made, if the journal is full, or None: then only the\n"
"arguments are looked at.");

static PyObject *
semaphore_create(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    Record record = {.index = -1};
    PyObject *name, *encoded;
    mode_t mode = 0;
    int64_t value = 0;
    if (state == NULL || tracked_create_arguments(state, args, 1, &record.journal, &name, &encoded, &mode) < 0) {
        return NULL;
    }
    OpenedSemaphore opened;
    int error = 0;
    Handle *handle = NULL;
    if (args_integer(PyTuple_GET_ITEM(args, 3), "initial_value", 0, SEMAPHORE_VALUE_LIMIT, &value) < 0 ||
        (record.journal != NULL && audit_open(KIND_SEMAPHORE, O_CREAT, name) < 0) ||
        (handle = handle_new(release_handle)) == NULL) {
        goto error;
    }
    Py_BEGIN_ALLOW_THREADS
    error = semaphore_file_create(PyBytes_AS_STRING(encoded), mode, (unsigned)value, &opened, &record);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        if (error != NO_SLOT) {
            raise_open(state, error, &opened, name);
        }
        goto error;
    }
    handle->semaphore = opened.semaphore;
    Py_INCREF(record.journal);
    install((SemaphoreObject *)op, handle, name, encoded, mode, &opened.identity, true,
            (Tracking){.active = true, .record = record});
    Py_RETURN_TRUE;
error:
    PyMem_Free(handle);
    Py_DECREF(name);
    Py_DECREF(encoded);
    return error == NO_SLOT ? Py_NewRef(Py_False) : NULL;
}

PyDoc_STRVAR(attach_doc,
"_attach($self, name, mode, /)\n--\n\n"
"Open a semaphore that exists, with a lease.");

static PyObject *
semaphore_attach(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    PyObject *name, *mode_arg;
    mode_t mode = 0;
    if (state == NULL || !PyArg_ParseTuple(args, "OO:_attach", &name, &mode_arg) || args_mode(mode_arg, &mode) < 0) {
        return NULL;
    }
    return attach(state, op, name, mode, true, NULL) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
semaphore_unlink_tracked(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return tracked_unlink_file((NamedObject *)self, KIND_SEMAPHORE);
}

#endif

/* ---- getters ---- */

static PyObject *
semaphore_get_value(PyObject *op, void *Py_UNUSED(closure))
{
    SemaphoreObject *self = (SemaphoreObject *)op;
    int error = 0, value = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->handle == NULL) {
        error = EBADF;
    }
#if HAVE_SEM_GETVALUE
    else if (sem_getvalue(self->handle->semaphore, &value) < 0) {
        error = errno;
    }
#else
    else {
        error = ENOSYS;
    }
#endif
    Py_END_CRITICAL_SECTION();
    return error != 0 ? named_raise(&self->head, error, "sem_getvalue", NULL) : PyLong_FromLong(value);
}

PyDoc_STRVAR(semaphore_doc,
"Semaphore(name, flags=0, mode=0o600, initial_value=0)\n--\n\n"
"A handle on a named semaphore, a counter of permits that processes share.\n\n"
"name: str or bytes, \"/\" and up to 251 bytes without another slash; None, with O_CREX, takes a random unused name.\n"
"flags: 0 opens what exists, O_CREAT creates what does not, O_CREX only creates.\n"
"mode: the permissions of a new semaphore, less the umask.\n"
"initial_value: the permits of a new semaphore, 0 to SEMAPHORE_VALUE_MAX; note the default of none.\n\n"
"`with semaphore:` takes a permit and gives it back. The semaphore outlives its handles and processes until it is\n"
"unlinked. Handles may be used from several threads at once, and pickled: that is by name.\n\n"
"Raises ExistentialError (no such semaphore, or with O_CREX: it exists), PermissionsError, ValueError, TypeError,\n"
"OSError (descriptors or memory exhausted), Error (the file of this name is no semaphore).\n\n"
"POSIX.1-2008: sem_open().");

static PyMethodDef semaphore_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))semaphore_acquire, METH_FASTCALL | METH_KEYWORDS, acquire_doc},
    {"release", semaphore_release, METH_NOARGS, release_doc},
    {"close", semaphore_close, METH_NOARGS, close_doc},
    {"unlink", semaphore_unlink, METH_NOARGS, unlink_doc},
    {"__enter__", semaphore_enter, METH_NOARGS, enter_doc},
    {"__exit__", (PyCFunction)(void (*)(void))semaphore_exit, METH_FASTCALL, exit_doc},
    {"__reduce__", semaphore_reduce, METH_NOARGS, reduce_doc},
#if HAVE_TRACKING
    {"_create", semaphore_create, METH_VARARGS, create_doc},
    {"_attach", semaphore_attach, METH_VARARGS, attach_doc},
    {"_unlink", semaphore_unlink_tracked, METH_NOARGS, tracked_unlink_doc},
    TRACKED_METHODS
#endif
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef semaphore_getset[] = {
    {"name", named_get_name, NULL, PyDoc_STR("The name as given to the constructor; str."), NULL},
    {"mode", named_get_mode, NULL, PyDoc_STR("The permissions as given to the constructor; int."), NULL},
    {"value", semaphore_get_value, NULL,
     PyDoc_STR("The permits that are free, at this instant; int. Raises ExistentialError when this handle is closed.\n"
               "\n"
               "POSIX.1-2008: sem_getvalue()."),
     NULL},
#if HAVE_TRACKING
    TRACKED_GETSET
#endif
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot semaphore_slots[] = {
    {Py_tp_doc, (void *)semaphore_doc},
    {Py_tp_new, semaphore_new},
    {Py_tp_init, semaphore_init},
    {Py_tp_dealloc, semaphore_dealloc},
    {Py_tp_repr, semaphore_repr},
    {Py_tp_str, named_str},
    {Py_tp_members, named_members},
    {Py_tp_methods, semaphore_methods},
    {Py_tp_getset, semaphore_getset},
    {0, NULL},
};

/* Not garbage-collected: the object refers to nothing but strings, and its type cannot be given attributes. */
PyType_Spec semaphore_spec = {
    .name = "posix_ipc.Semaphore",
    .basicsize = sizeof(SemaphoreObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = semaphore_slots,
};
