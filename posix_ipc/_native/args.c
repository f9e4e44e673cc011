/* What callers pass: binding arguments to names, and converting them with errors that say what was wrong. */
#include "ext.h"

#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__) || defined(__APPLE__) /* getentropy, which others have in unistd.h */
#include <sys/random.h>
#endif

/* ---- binding ---- */

static int
check_count(const Signature *signature, Py_ssize_t given)
{
    if (given > signature->positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)", signature->function,
                     signature->positional, given);
        return -1;
    }
    return 0;
}

static int
place_keyword(const Signature *signature, PyObject *key, PyObject *value, PyObject **bound)
{
    for (int i = 0; i < signature->count; i++) {
        if (PyUnicode_CompareWithASCIIString(key, signature->names[i]) != 0) {
            continue;
        }
        if (bound[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%s'", signature->function,
                         signature->names[i]);
            return -1;
        }
        bound[i] = value;
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R", signature->function, key);
    return -1;
}

static int
check_required(const Signature *signature, PyObject **bound)
{
    for (int i = 0; i < signature->required; i++) {
        if (bound[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s' (pos %d)", signature->function,
                         signature->names[i], i + 1);
            return -1;
        }
    }
    return 0;
}

int
args_bind(const Signature *signature, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **bound)
{
    if (check_count(signature, nargs) < 0) {
        return -1;
    }
    for (int i = 0; i < signature->count; i++) {
        bound[i] = i < nargs ? args[i] : NULL;
    }
    if (kwnames != NULL) {
        Py_ssize_t keywords = PyTuple_GET_SIZE(kwnames);
        for (Py_ssize_t i = 0; i < keywords; i++) {
            if (place_keyword(signature, PyTuple_GET_ITEM(kwnames, i), args[nargs + i], bound) < 0) {
                return -1;
            }
        }
    }
    return check_required(signature, bound);
}

int
args_bind_init(const Signature *signature, PyObject *args, PyObject *kwargs, PyObject **bound)
{
    Py_ssize_t nargs = PyTuple_GET_SIZE(args);
    if (check_count(signature, nargs) < 0) {
        return -1;
    }
    for (int i = 0; i < signature->count; i++) {
        bound[i] = i < nargs ? PyTuple_GET_ITEM(args, i) : NULL;
    }
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &position, &key, &value)) {
        if (place_keyword(signature, key, value, bound) < 0) {
            return -1;
        }
    }
    if (check_required(signature, bound) < 0) {
        return -1;
    }
    for (int i = 0; i < signature->count; i++) {
        Py_XINCREF(bound[i]);
    }
    return 0;
}

void
args_release(const Signature *signature, PyObject **bound)
{
    for (int i = 0; i < signature->count; i++) {
        Py_CLEAR(bound[i]);
    }
}

/* ---- numbers ---- */

int
args_integer(PyObject *arg, const char *what, int64_t minimum, int64_t maximum, int64_t *out)
{
    if (arg == NULL) {
        return 0;
    }
    PyObject *number = PyNumber_Index(arg);
    if (number == NULL) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "%s must be an int, not %.100s", what, Py_TYPE(arg)->tp_name);
        }
        return -1;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (value == -1 && PyErr_Occurred()) {
        Py_DECREF(number);
        return -1;
    }
    if (overflow != 0 || value < minimum || value > maximum) {
        PyErr_Format(PyExc_ValueError, "%s must be from %lld to %lld, not %R", what, (long long)minimum,
                     (long long)maximum, number);
        Py_DECREF(number);
        return -1;
    }
    Py_DECREF(number);
    *out = value;
    return 0;
}

int
args_flags(PyObject *arg, int *out)
{
    int64_t flags = *out;
    if (args_integer(arg, "flags", INT_MIN, INT_MAX, &flags) < 0) {
        return -1;
    }
    *out = (int)flags;
    return 0;
}

int
args_mode(PyObject *arg, mode_t *out)
{
    int64_t mode = *out;
    if (args_integer(arg, "mode", 0, 0177777, &mode) < 0) { /* what os.stat() gives fits too; the kernel masks it */
        return -1;
    }
    *out = (mode_t)mode;
    return 0;
}

int
args_bool(PyObject *arg, const char *what, bool *out)
{
    if (arg == NULL) {
        return 0;
    }
    if (!PyIndex_Check(arg)) { /* "no", [] and None are more likely a slip than a truth value */
        PyErr_Format(PyExc_TypeError, "%s must be a bool, not %.100s", what, Py_TYPE(arg)->tp_name);
        return -1;
    }
    int truth = PyObject_IsTrue(arg);
    if (truth < 0) {
        return -1;
    }
    *out = truth;
    return 0;
}

/* ---- timeouts ---- */

static int
refuse_timeout(PyObject *arg, const char *negative)
{
    PyErr_Format(PyExc_TypeError, "timeout must be None or a number of seconds that is not negative, not a %s%.100s",
                 negative, Py_TYPE(arg)->tp_name);
    return -1;
}

/* Of a number that is too large for a double: infinity with its sign. */
static int
infinite_seconds(PyObject *arg, double *seconds)
{
    PyErr_Clear();
    PyObject *zero = PyLong_FromLong(0);
    int negative = zero != NULL ? PyObject_RichCompareBool(arg, zero, Py_LT) : -1;
    Py_XDECREF(zero);
    *seconds = negative ? -Py_HUGE_VAL : Py_HUGE_VAL;
    return negative < 0 ? -1 : 0;
}

/* Seconds as a double; infinity for an int that is too large for anything. */
static int
timeout_seconds(PyObject *arg, double *seconds)
{
    if (PyFloat_CheckExact(arg)) {
        *seconds = PyFloat_AS_DOUBLE(arg);
        return 0;
    }
    if (PyLong_Check(arg)) {
        int overflow;
        long long value = PyLong_AsLongLongAndOverflow(arg, &overflow);
        *seconds = overflow == 0 ? (double)value : overflow * Py_HUGE_VAL;
        return 0;
    }
    *seconds = PyFloat_AsDouble(arg);
    if (*seconds == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            refuse_timeout(arg, "");
        }
        return PyErr_ExceptionMatches(PyExc_OverflowError) ? infinite_seconds(arg, seconds) : -1;
    }
    return 0;
}

int
args_timeout(PyObject *arg, int64_t *nanoseconds)
{
    if (arg == NULL) {
        return 0;
    }
    if (arg == Py_None) {
        *nanoseconds = FOREVER;
        return 0;
    }
    double seconds;
    if (timeout_seconds(arg, &seconds) < 0) {
        return -1;
    }
    if (isnan(seconds)) {
        PyErr_SetString(PyExc_ValueError, "timeout must not be nan");
        return -1;
    }
    if (seconds < 0) {
        return refuse_timeout(arg, "negative ");
    }
    /* 100 years: far enough from the end of a 64-bit count of nanoseconds to be added to any clock's reading. */
    const double limit = 100.0 * 366 * 24 * 3600;
    *nanoseconds = seconds > limit ? FOREVER : (int64_t)ceil(seconds * 1e9);
    return 0;
}

/* ---- names ---- */

int
args_name(PyObject *arg, PyObject **text, PyObject **encoded)
{
    PyObject *as_text, *as_bytes;
    if (PyUnicode_Check(arg)) {
        as_text = PyUnicode_FromObject(arg); /* an exact str: the name is compared and printed without running code */
        as_bytes = as_text != NULL ? PyUnicode_EncodeFSDefault(as_text) : NULL;
    }
    else if (PyBytes_Check(arg)) {
        as_bytes = PyBytes_FromStringAndSize(PyBytes_AS_STRING(arg), PyBytes_GET_SIZE(arg));
        as_text = as_bytes != NULL ? PyUnicode_DecodeFSDefaultAndSize(PyBytes_AS_STRING(arg), PyBytes_GET_SIZE(arg))
                                   : NULL;
    }
    else {
        PyErr_Format(PyExc_TypeError, "name must be a str or bytes, not %.100s", Py_TYPE(arg)->tp_name);
        return -1;
    }
    if (as_text == NULL || as_bytes == NULL) {
        goto error;
    }
    if (strlen(PyBytes_AS_STRING(as_bytes)) != (size_t)PyBytes_GET_SIZE(as_bytes)) {
        PyErr_Format(PyExc_ValueError, "name must not contain a null character: %R", as_text);
        goto error;
    }
    *text = as_text;
    *encoded = as_bytes;
    return 0;
error:
    Py_XDECREF(as_text);
    Py_XDECREF(as_bytes);
    return -1;
}

/* "/" and 13 unpredictable characters: within 14, the shortest limit of all systems. */
static int
random_name(PyObject **text, PyObject **encoded)
{
    static const char alphabet[] = "abcdefghijklmnopqrstuvwxyz234567"; /* 32: five bits each, without a bias */
    unsigned char bits[13];
    if (getentropy(bits, sizeof(bits)) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    char name[sizeof(bits) + 2];
    name[0] = '/';
    for (size_t i = 0; i < sizeof(bits); i++) {
        name[i + 1] = alphabet[bits[i] % 32];
    }
    name[sizeof(name) - 1] = '\0';
    PyObject *as_text = PyUnicode_FromString(name);
    PyObject *as_bytes = as_text != NULL ? PyBytes_FromString(name) : NULL;
    if (as_bytes == NULL) {
        Py_XDECREF(as_text);
        return -1;
    }
    *text = as_text;
    *encoded = as_bytes;
    return 0;
}

int
args_name_for(PyObject *arg, int flags, PyObject **text, PyObject **encoded)
{
    if ((flags & O_EXCL) && !(flags & O_CREAT)) {
        PyErr_SetString(PyExc_ValueError, "flags: O_EXCL means nothing without O_CREAT; O_CREX is both");
        return -1;
    }
    if (PyUnicode_Check(arg) || PyBytes_Check(arg)) {
        return args_name(arg, text, encoded);
    }
    if (arg != Py_None) {
        PyErr_Format(PyExc_TypeError, "name must be a str, bytes or None, not %.100s", Py_TYPE(arg)->tp_name);
        return -1;
    }
    if (!(flags & O_EXCL)) {
        PyErr_SetString(PyExc_ValueError, "name may be None only with O_CREX (O_CREAT | O_EXCL): that creates a new object");
        return -1;
    }
    return random_name(text, encoded);
}
