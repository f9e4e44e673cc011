/* posix_ipc._ext: the module, its state, constants, exceptions and functions. The types are in _native/. */
#include "_native/ext.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#ifndef POSIX_IPC_VERSION
#error "POSIX_IPC_VERSION comes from setup.py"
#endif

static struct PyModuleDef ext_module;

/* ---- state ---- */

State *
state_of_type(PyTypeObject *type)
{
#if PY_VERSION_HEX >= 0x030B0000
    PyObject *module = PyType_GetModuleByDef(type, &ext_module);
#else
    PyObject *module = _PyType_GetModuleByDef(type, &ext_module); /* the same, before it was public */
#endif
    return module != NULL ? PyModule_GetState(module) : NULL;
}

State *
state_of(PyObject *self)
{
    return state_of_type(Py_TYPE(self));
}

/* ---- functions ---- */

static PyObject *
unlink_function(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, const char *function,
                Kind kind)
{
    static const char *const names[] = {"name"};
    const Signature signature = {function, names, 1, 1, 1};
    PyObject *bound[1];
    if (args_bind(&signature, args, nargs, kwnames, bound) < 0) {
        return NULL;
    }
    return unlink_by_name(PyModule_GetState(module), bound[0], kind);
}

PyDoc_STRVAR(unlink_semaphore_doc,
"unlink_semaphore($module, /, name)\n--\n\n"
"Remove the name of a semaphore; it goes when the last process has closed it.\n\n"
"name: str or bytes. Raises ExistentialError (no such semaphore), PermissionsError, ValueError, TypeError.\n\n"
"POSIX.1-2008: sem_unlink().");

static PyObject *
unlink_semaphore(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return unlink_function(module, args, nargs, kwnames, "unlink_semaphore", KIND_SEMAPHORE);
}

PyDoc_STRVAR(unlink_shared_memory_doc,
"unlink_shared_memory($module, /, name)\n--\n\n"
"Remove the name of a segment; its memory goes when the last process has unmapped and closed it.\n\n"
"name: str or bytes. Raises ExistentialError (no such segment), PermissionsError, ValueError, TypeError.\n\n"
"POSIX.1-2008: shm_unlink().");

static PyObject *
unlink_shared_memory(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return unlink_function(module, args, nargs, kwnames, "unlink_shared_memory", KIND_SHARED_MEMORY);
}

#if HAVE_MESSAGE_QUEUES
PyDoc_STRVAR(unlink_message_queue_doc,
"unlink_message_queue($module, /, name)\n--\n\n"
"Remove the name of a queue; it and its messages go when the last process has closed it.\n\n"
"name: str or bytes. Raises ExistentialError (no such queue), PermissionsError, ValueError, TypeError.\n\n"
"POSIX.1-2008: mq_unlink().");

static PyObject *
unlink_message_queue(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return unlink_function(module, args, nargs, kwnames, "unlink_message_queue", KIND_MESSAGE_QUEUE);
}

PyDoc_STRVAR(stop_notifications_doc,
"_stop_notifications($module, /)\n--\n\n"
"Called when the interpreter ends: no callback of a queue begins after this.");

static PyObject *
stop_notifications(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    notifier_stop(PyModule_GetState(module));
    Py_RETURN_NONE;
}
#endif

PyDoc_STRVAR(raise_errno_doc,
"_raise_errno($module, errno, call, name=None, /)\n--\n\n"
"Raise the exception of this package that an errno of a system call stands for.");

static PyObject *
raise_errno_function(PyObject *module, PyObject *args)
{
    int error;
    const char *call;
    PyObject *name = Py_None;
    if (!PyArg_ParseTuple(args, "is|O:_raise_errno", &error, &call, &name)) {
        return NULL;
    }
    if (name != Py_None && !PyUnicode_Check(name)) {
        PyErr_SetString(PyExc_TypeError, "name must be a str or None");
        return NULL;
    }
    return raise_errno(PyModule_GetState(module), error, call, name != Py_None ? name : NULL, NULL);
}

typedef int (*ReopenFunction)(State *, PyObject *, PyObject *, mode_t, int, const Identity *);

/* How to open what a pickle of this class names, and the type of ours it must be. */
static ReopenFunction
reopen_function(State *state, PyObject *type, PyTypeObject **base)
{
    const struct {
        PyTypeObject *base;
        ReopenFunction reopen;
    } kinds[] = {
        {state->Semaphore, semaphore_reopen},
        {state->SharedMemory, shared_memory_reopen},
#if HAVE_MESSAGE_QUEUES
        {state->MessageQueue, message_queue_reopen},
#endif
    };
    for (size_t i = 0; PyType_Check(type) && i < Py_ARRAY_LENGTH(kinds); i++) {
        if (PyType_IsSubtype((PyTypeObject *)type, kinds[i].base)) {
            *base = kinds[i].base;
            return kinds[i].reopen;
        }
    }
    PyErr_Format(PyExc_TypeError, "_rebuild() takes a class of this package, not %R", type);
    return NULL;
}

PyDoc_STRVAR(rebuild_doc,
"_rebuild($module, cls, name, identity, mode, options, tree=0, /)\n--\n\n"
"What a pickle calls: a new handle of class cls on an object that exists.\n\n"
"Calls cls.__new__(cls), not __init__, opens `name` and never creates it. Raises ExistentialError when the name is gone,\n"
"leads to another object than the one of this identity, or was made on another host or in another namespace.");

static PyObject *
rebuild(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    PyObject *type, *name, *packed, *mode_arg;
    int options;
    unsigned long long tree = 0;
    mode_t mode = 0;
    Identity wanted;
    PyTypeObject *base;
    if (!PyArg_ParseTuple(args, "OOOOi|K:_rebuild", &type, &name, &packed, &mode_arg, &options, &tree)) {
        return NULL;
    }
    ReopenFunction reopen = reopen_function(state, type, &base);
    if (reopen == NULL || args_mode(mode_arg, &mode) < 0 || identity_unpack(packed, &wanted) < 0) {
        return NULL;
    }
    if (options & ~OPTIONS_ALL) {
        return PyErr_Format(PyExc_ValueError, "this pickle holds options that no handle has: %d", options);
    }
    if (identity_check_host(state, &wanted, name) < 0) {
        return NULL;
    }
    PyObject *self = PyObject_CallMethod(type, "__new__", "O", type);
    if (self == NULL) {
        return NULL;
    }
    if (!PyObject_TypeCheck(self, base)) {
        PyErr_Format(PyExc_TypeError, "%R.__new__() returned a %.100s", type, Py_TYPE(self)->tp_name);
        Py_DECREF(self);
        return NULL;
    }
    if (reopen(state, self, name, mode, options, &wanted) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    named_set_origin((NamedObject *)self, tree, options & OPTION_CREATED);
    return self;
}

/* ---- what is in the module ---- */

static int
add_integers(PyObject *module)
{
    const struct {
        const char *name;
        long value;
    } integers[] = {
        {"O_CREAT", O_CREAT},
        {"O_EXCL", O_EXCL},
        {"O_CREX", O_CREAT | O_EXCL},
        {"O_TRUNC", O_TRUNC},
        {"O_RDONLY", O_RDONLY},
        {"O_WRONLY", O_WRONLY},
        {"O_RDWR", O_RDWR},
        {"O_NONBLOCK", O_NONBLOCK},
        {"PAGE_SIZE", sysconf(_SC_PAGESIZE)},
        {"SEMAPHORE_VALUE_MAX", SEMAPHORE_VALUE_LIMIT},
#if HAVE_MESSAGE_QUEUES
        {"QUEUE_MESSAGES_MAX_DEFAULT", QUEUE_MAX_MESSAGES},
        {"QUEUE_MESSAGE_SIZE_MAX_DEFAULT", QUEUE_MAX_MESSAGE_SIZE},
        {"QUEUE_PRIORITY_MAX", QUEUE_PRIORITY_LIMIT},
        {"USER_SIGNAL_MIN", SIGRTMIN},
        {"USER_SIGNAL_MAX", SIGRTMAX},
#endif
    };
    const struct {
        const char *name;
        bool value;
    } features[] = {
        {"SEMAPHORE_TIMEOUT_SUPPORTED", HAVE_SEM_TIMEDWAIT},
        {"SEMAPHORE_VALUE_SUPPORTED", HAVE_SEM_GETVALUE},
        {"MESSAGE_QUEUES_SUPPORTED", HAVE_MESSAGE_QUEUES},
    };
    for (size_t i = 0; i < Py_ARRAY_LENGTH(integers); i++) {
        if (PyModule_AddIntConstant(module, integers[i].name, integers[i].value) < 0) {
            return -1;
        }
    }
    for (size_t i = 0; i < Py_ARRAY_LENGTH(features); i++) {
        if (PyModule_AddObjectRef(module, features[i].name, features[i].value ? Py_True : Py_False) < 0) {
            return -1;
        }
    }
    return 0;
}

static int
add_texts(PyObject *module)
{
    return PyModule_AddStringConstant(module, "VERSION", POSIX_IPC_VERSION) < 0 ||
                   PyModule_AddStringConstant(module, "__version__", POSIX_IPC_VERSION) < 0 ||
                   PyModule_AddStringConstant(module, "_SEMAPHORE_FILE_PREFIX", SEMAPHORE_FILE_PREFIX) < 0
               ? -1 : 0;
}

static int
add_exception(PyObject *module, PyObject **slot, const char *name, const char *doc, PyObject *base, PyObject *attributes)
{
    *slot = PyErr_NewExceptionWithDoc(name, doc, base, attributes);
    return *slot == NULL ? -1 : PyModule_AddObjectRef(module, strchr(name, '.') + 1, *slot);
}

static int
add_exceptions(PyObject *module, State *state)
{
    PyObject *attributes = Py_BuildValue("{s:O,s:O}", "errno", Py_None, "name", Py_None);
    if (attributes == NULL) {
        return -1;
    }
    int result = add_exception(module, &state->Error, "posix_ipc.Error",
                               "The base of this package's exceptions. errno is the error number of the system call, "
                               "name the name of the object; None where there is none.",
                               NULL, attributes);
    Py_DECREF(attributes);
    if (result < 0 ||
        add_exception(module, &state->SignalError, "posix_ipc.SignalError",
                      "A signal arrived during a wait (EINTR). What its handler raised is the cause.",
                      state->Error, NULL) < 0 ||
        add_exception(module, &state->PermissionsError, "posix_ipc.PermissionsError",
                      "The object's mode, or the way this handle was opened, forbids it (EACCES, EPERM).",
                      state->Error, NULL) < 0 ||
        add_exception(module, &state->ExistentialError, "posix_ipc.ExistentialError",
                      "An object does not exist (ENOENT), exists already (EEXIST), is another one than was meant "
                      "(ESTALE), or the handle is closed (EBADF).",
                      state->Error, NULL) < 0 ||
        add_exception(module, &state->BusyError, "posix_ipc.BusyError",
                      "It could not be done at once, or in the time given (EAGAIN, ETIMEDOUT), or another process is "
                      "notified already (EBUSY).",
                      state->Error, NULL) < 0) {
        return -1;
    }
    return 0;
}

static int
add_type(PyObject *module, PyTypeObject **slot, PyType_Spec *spec)
{
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot == NULL ? -1 : PyModule_AddType(module, *slot);
}

static int
add_types(PyObject *module, State *state)
{
    if (add_type(module, &state->Semaphore, &semaphore_spec) < 0 ||
        add_type(module, &state->SharedMemory, &shared_memory_spec) < 0) {
        return -1;
    }
    state->Export = (PyTypeObject *)PyType_FromSpec(&export_spec); /* knows no module, so there is no cycle with it */
    if (state->Export == NULL) {
        return -1;
    }
#if HAVE_MESSAGE_QUEUES
    if (add_type(module, &state->MessageQueue, &message_queue_spec) < 0) {
        return -1;
    }
#endif
#if HAVE_TRACKING
    if (add_type(module, &state->Journal, &journal_spec) < 0) {
        return -1;
    }
#endif
    return 0;
}

#if HAVE_MESSAGE_QUEUES
static int
stop_at_exit(PyObject *module)
{
    PyObject *result = NULL;
    PyObject *stop = PyObject_GetAttrString(module, "_stop_notifications");
    PyObject *atexit = stop != NULL ? PyImport_ImportModule("atexit") : NULL;
    if (atexit != NULL) {
        result = PyObject_CallMethod(atexit, "register", "O", stop);
    }
    Py_XDECREF(stop);
    Py_XDECREF(atexit);
    Py_XDECREF(result);
    return result != NULL ? 0 : -1;
}
#endif

static int
ext_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    identity_read_boot_id(state->boot_id);
    if (add_integers(module) < 0 || add_texts(module) < 0 || add_exceptions(module, state) < 0 ||
        add_types(module, state) < 0) {
        return -1;
    }
#if HAVE_MESSAGE_QUEUES
    if (stop_at_exit(module) < 0) {
        return -1;
    }
#endif
    state->rebuild = PyObject_GetAttrString(module, "_rebuild");
    return state->rebuild != NULL ? 0 : -1;
}

static int
ext_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->Error);
    Py_VISIT(state->SignalError);
    Py_VISIT(state->PermissionsError);
    Py_VISIT(state->ExistentialError);
    Py_VISIT(state->BusyError);
    Py_VISIT(state->Semaphore);
    Py_VISIT(state->SharedMemory);
    Py_VISIT(state->MessageQueue);
    Py_VISIT(state->Export);
    Py_VISIT(state->Journal);
    Py_VISIT(state->rebuild);
    return 0;
}

/* Only what closes a cycle with the module. The rest stays for handles that are used by finalizers in the end. */
static int
ext_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->Semaphore);
    Py_CLEAR(state->SharedMemory);
    Py_CLEAR(state->MessageQueue);
    Py_CLEAR(state->Journal);
    Py_CLEAR(state->rebuild);
    return 0;
}

static void
ext_free(void *module)
{
    State *state = PyModule_GetState(module);
    ext_clear(module);
    Py_CLEAR(state->Export);
    Py_CLEAR(state->Error);
    Py_CLEAR(state->SignalError);
    Py_CLEAR(state->PermissionsError);
    Py_CLEAR(state->ExistentialError);
    Py_CLEAR(state->BusyError);
#if HAVE_MESSAGE_QUEUES
    notifier_release(atomic_exchange(&state->notifier, NULL));
#endif
}

static PyMethodDef ext_functions[] = {
    {"unlink_semaphore", (PyCFunction)(void (*)(void))unlink_semaphore, METH_FASTCALL | METH_KEYWORDS,
     unlink_semaphore_doc},
    {"unlink_shared_memory", (PyCFunction)(void (*)(void))unlink_shared_memory, METH_FASTCALL | METH_KEYWORDS,
     unlink_shared_memory_doc},
#if HAVE_MESSAGE_QUEUES
    {"unlink_message_queue", (PyCFunction)(void (*)(void))unlink_message_queue, METH_FASTCALL | METH_KEYWORDS,
     unlink_message_queue_doc},
    {"_stop_notifications", stop_notifications, METH_NOARGS, stop_notifications_doc},
#endif
#if HAVE_TRACKING
    {"_facts", system_facts, METH_O,
     PyDoc_STR("_facts($module, descriptor, /)\n--\n\n(device, inode, born in ns, mode, uid, links, size) of what it "
               "leads to. statx(2).")},
    {"_facts_at", system_facts_at, METH_O,
     PyDoc_STR("_facts_at($module, path, /)\n--\n\nThe same by path; a symbolic link is not followed.")},
    {"_is_locked", system_is_locked, METH_O,
     PyDoc_STR("_is_locked($module, path, /)\n--\n\nDoes somebody hold an exclusive flock on this file? False also if "
               "it does not exist.")},
    {"_is_tmpfs", system_is_tmpfs, METH_O,
     PyDoc_STR("_is_tmpfs($module, path, /)\n--\n\nIs it on a tmpfs? statfs(2).")},
    {"_rename_noreplace", system_rename_noreplace, METH_VARARGS,
     PyDoc_STR("_rename_noreplace($module, source, target, /)\n--\n\nRename, unless the target exists. renameat2(2).")},
    {"_strike", journal_strike, METH_VARARGS,
     PyDoc_STR("_strike($module, path, slot, identity, /)\n--\n\nFree a slot of any journal if it speaks of this object; True "
               "if it did.")},
    {"_pidfd_open", system_pidfd_open, METH_O,
     PyDoc_STR("_pidfd_open($module, pid, /)\n--\n\nA descriptor that can be read from when the process ends. See pidfd_open(2).")},
    {"_watch", system_watch, METH_O,
     PyDoc_STR("_watch($module, directory, /)\n--\n\nA descriptor that tells when a file of the directory that was "
               "open for writing is no longer. inotify(7).")},
    {"_start_tracker", system_start_tracker, METH_VARARGS,
     PyDoc_STR("_start_tracker($module, lock, argv, /)\n--\n\nStart a program in a session of its own that holds a "
               "lock on this file as descriptor 3, unless one does. Waits for nothing that Python does.")},
#endif
    {"_raise_errno", raise_errno_function, METH_VARARGS, raise_errno_doc},
    {"_rebuild", rebuild, METH_VARARGS, rebuild_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot ext_slots[] = {
    {Py_mod_exec, ext_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* every handle guards itself: see ext.h */
#endif
    {0, NULL},
};

PyDoc_STRVAR(ext_doc, "POSIX semaphores, shared memory and message queues: the C part of posix_ipc.");

static struct PyModuleDef ext_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "posix_ipc._ext",
    .m_doc = ext_doc,
    .m_size = sizeof(State),
    .m_methods = ext_functions,
    .m_slots = ext_slots,
    .m_traverse = ext_traverse,
    .m_clear = ext_clear,
    .m_free = ext_free,
};

PyMODINIT_FUNC PyInit__ext(void); /* looked up by the importing interpreter */

PyMODINIT_FUNC
PyInit__ext(void)
{
    return PyModuleDef_Init(&ext_module);
}
