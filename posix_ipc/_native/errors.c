/* From an errno to the exception that it means, with the call, the object and the limit in its message. */
#include "ext.h"

#include <errno.h>
#include <string.h>

typedef enum { TYPE_OS, TYPE_VALUE, TYPE_PERMISSIONS, TYPE_EXISTENTIAL, TYPE_BUSY, TYPE_SIGNAL } ErrorType;

/* What is not listed is an OSError. */
static const struct {
    int error;
    ErrorType type;
} error_types[] = {
    {EACCES, TYPE_PERMISSIONS}, {EPERM, TYPE_PERMISSIONS},
    {ENOENT, TYPE_EXISTENTIAL}, {EEXIST, TYPE_EXISTENTIAL}, {EBADF, TYPE_EXISTENTIAL},
    {ESTALE, TYPE_EXISTENTIAL}, {EIDRM, TYPE_EXISTENTIAL},
    {EAGAIN, TYPE_BUSY},        {ETIMEDOUT, TYPE_BUSY},     {EBUSY, TYPE_BUSY},
    {EINTR, TYPE_SIGNAL},
    {EINVAL, TYPE_VALUE},       {ENAMETOOLONG, TYPE_VALUE}, {EFBIG, TYPE_VALUE}, {EMSGSIZE, TYPE_VALUE},
};

static PyObject *
error_type(State *state, int error)
{
    ErrorType type = TYPE_OS;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(error_types); i++) {
        if (error_types[i].error == error) {
            type = error_types[i].type;
            break;
        }
    }
    switch (type) {
    case TYPE_VALUE:       return PyExc_ValueError;
    case TYPE_PERMISSIONS: return state->PermissionsError;
    case TYPE_EXISTENTIAL: return state->ExistentialError;
    case TYPE_BUSY:        return state->BusyError;
    case TYPE_SIGNAL:      return state->SignalError;
    case TYPE_OS:          break;
    }
    return PyExc_OSError;
}

/* Raises a posix_ipc.Error with its attributes. They are class attributes with the value None until set here. */
static void
raise_with_attributes(PyObject *type, int error, PyObject *name, PyObject *message)
{
    PyObject *exception = PyObject_CallOneArg(type, message);
    if (exception == NULL) {
        return;
    }
    PyObject *number = NULL;
    if (error != 0) {
        number = PyLong_FromLong(error);
        if (number == NULL || PyObject_SetAttrString(exception, "errno", number) < 0) {
            goto done;
        }
    }
    if (name != NULL && PyObject_SetAttrString(exception, "name", name) < 0) {
        goto done;
    }
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
done:
    Py_XDECREF(number);
    Py_DECREF(exception);
}

PyObject *
raise_os_error(int error, PyObject *name, PyObject *message)
{
    PyObject *exception = name != NULL ? PyObject_CallFunction(PyExc_OSError, "iOO", error, message, name)
                                       : PyObject_CallFunction(PyExc_OSError, "iO", error, message);
    if (exception != NULL) { /* of the subclass that belongs to the errno */
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
    }
    return NULL;
}

/* The system's text, by the locale's encoding; the static buffer of strerror() is not safe among threads. */
static PyObject *
system_text(int error)
{
    char buffer[256];
#if defined(__GLIBC__) /* with _GNU_SOURCE the function returns the text, here or elsewhere */
    const char *text = strerror_r(error, buffer, sizeof(buffer));
#else
    const char *text = strerror_r(error, buffer, sizeof(buffer)) == 0 ? buffer : "Unknown error";
#endif
    return PyUnicode_DecodeLocale(text, "surrogateescape");
}

PyObject *
raise_errno(State *state, int error, const char *call, PyObject *name, const char *reason)
{
    char limit[256];
    limit_describe(limit, sizeof(limit), call, error);
    if (reason == NULL && error == EBUSY && strcmp(call, "flock") == 0) {
        reason = "another program keeps it locked"; /* for longer than a lease waits: see lease_lock */
    }
    PyObject *text = reason != NULL ? PyUnicode_FromString(reason) : system_text(error);
    if (text == NULL) {
        return NULL;
    }
    PyObject *message = name != NULL ? PyUnicode_FromFormat("%s(%R): %U%s", call, name, text, limit)
                                     : PyUnicode_FromFormat("%s: %U%s", call, text, limit);
    Py_DECREF(text);
    if (message == NULL) {
        return NULL;
    }
    PyObject *type = error_type(state, error);
    if (type == PyExc_OSError) {
        raise_os_error(error, name, message);
    }
    else if (type == PyExc_ValueError) {
        PyErr_SetObject(type, message);
    }
    else {
        raise_with_attributes(type, error, name, message);
    }
    Py_DECREF(message);
    return NULL;
}

PyObject *
raise_error(PyObject *type, int error, PyObject *name, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (message != NULL) {
        raise_with_attributes(type, error, name, message);
        Py_DECREF(message);
    }
    return NULL;
}

PyObject *
raise_closed(State *state, const char *call, PyObject *name)
{
    if (name == NULL) {
        return raise_error(state->ExistentialError, 0, NULL, "%s: this handle was never opened", call);
    }
    return raise_error(state->ExistentialError, EBADF, name, "%s(%R): this handle is closed", call, name);
}

/* The exception that is set, which is not set any more. */
static PyObject *
exception_take(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(value, traceback);
        Py_DECREF(traceback);
    }
    Py_XDECREF(type);
    return value;
#endif
}

/* The reverse; steals the reference. */
static void
exception_restore(PyObject *exception)
{
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(exception);
#else
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
#endif
}

PyObject *
raise_interrupted(State *state, const char *call, PyObject *name)
{
    if (PyErr_CheckSignals() == 0) {
        return raise_errno(state, EINTR, call, name, NULL);
    }
    if (!PyErr_ExceptionMatches(PyExc_Exception)) {
        return NULL;
    }
    PyObject *cause = exception_take();
    raise_errno(state, EINTR, call, name, "interrupted by a signal whose handler raised");
    PyObject *raised = exception_take();
    PyException_SetContext(raised, Py_NewRef(cause)); /* steals */
    PyException_SetCause(raised, cause);              /* steals */
    exception_restore(raised);
    return NULL;
}
