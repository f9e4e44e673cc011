/* System calls that the reaper and the tracker need and Python does not offer. */
#include "ext.h"

#if HAVE_TRACKING

#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#endif

static PyObject *
facts_tuple(const FileFacts *facts)
{
    return Py_BuildValue("(KKKIIKL)", (unsigned long long)facts->identity.device,
                         (unsigned long long)facts->identity.inode, (unsigned long long)facts->identity.born,
                         (unsigned)facts->mode, (unsigned)facts->uid, (unsigned long long)facts->links,
                         (long long)facts->size);
}

PyObject *
system_facts(PyObject *Py_UNUSED(module), PyObject *arg)
{
    FileFacts facts;
    int descriptor = PyObject_AsFileDescriptor(arg);
    if (descriptor < 0) {
        return NULL;
    }
    return identity_facts(descriptor, &facts) < 0 ? PyErr_SetFromErrno(PyExc_OSError) : facts_tuple(&facts);
}

PyObject *
system_facts_at(PyObject *Py_UNUSED(module), PyObject *arg)
{
    FileFacts facts;
    PyObject *path, *result;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    result = identity_facts_at(PyBytes_AS_STRING(path), &facts) < 0
                 ? PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg)
                 : facts_tuple(&facts);
    Py_DECREF(path);
    return result;
}

/* The look is a shared lock for an instant, which other lookers do not notice. */
int
system_probe_lock(const char *path)
{
    int descriptor = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return errno == ENOENT ? 0 : -1;
    }
    int result = flock(descriptor, LOCK_SH | LOCK_NB) == 0 ? 0 : errno == EWOULDBLOCK ? 1 : -1;
    int error = errno;
    close(descriptor);
    errno = error;
    return result;
}

PyObject *
system_is_locked(PyObject *Py_UNUSED(module), PyObject *arg)
{
    PyObject *path;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    int locked = system_probe_lock(PyBytes_AS_STRING(path));
    PyObject *result = locked < 0 ? PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg) : PyBool_FromLong(locked);
    Py_DECREF(path);
    return result;
}

PyObject *
system_is_tmpfs(PyObject *Py_UNUSED(module), PyObject *arg)
{
    struct statfs status;
    PyObject *path;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    PyObject *result = statfs(PyBytes_AS_STRING(path), &status) < 0
                           ? PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg)
                           : PyBool_FromLong(status.f_type == TMPFS_MAGIC);
    Py_DECREF(path);
    return result;
}

PyObject *
system_rename_noreplace(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *from = NULL, *to = NULL, *result = NULL;
    if (PyArg_ParseTuple(args, "O&O&:_rename_noreplace", PyUnicode_FSConverter, &from, PyUnicode_FSConverter, &to)) {
        result = syscall(SYS_renameat2, AT_FDCWD, PyBytes_AS_STRING(from), AT_FDCWD, PyBytes_AS_STRING(to),
                         RENAME_NOREPLACE) < 0
                     ? PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, from)
                     : Py_NewRef(Py_None);
        Py_DECREF(from);
        Py_DECREF(to);
    }
    return result;
}

PyObject *
system_watch(PyObject *Py_UNUSED(module), PyObject *arg)
{
    PyObject *path;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return NULL;
    }
    int descriptor = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (descriptor < 0 ||
        inotify_add_watch(descriptor, PyBytes_AS_STRING(path), IN_CLOSE_WRITE | IN_ONLYDIR | IN_DELETE_SELF) < 0) {
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, arg);
        if (descriptor >= 0) {
            close(descriptor);
        }
        Py_DECREF(path);
        return NULL;
    }
    Py_DECREF(path);
    return PyLong_FromLong(descriptor);
}

/* A descriptor that can be read from when the process ends. os.pidfd_open is not in every Python. */
PyObject *
system_pidfd_open(PyObject *Py_UNUSED(module), PyObject *arg)
{
#if defined(SYS_pidfd_open)
    long pid = PyLong_AsLong(arg);
    if (pid == -1 && PyErr_Occurred()) {
        return NULL;
    }
    int descriptor = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
    return descriptor < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(descriptor);
#else
    (void)arg;
    errno = ENOSYS;
    return PyErr_SetFromErrno(PyExc_OSError);
#endif
}

/* ---- starting the tracker ---- */

/* Everything that the children need, made before the fork: they may only make system calls, because another thread may
 * have held any lock when they were made. */
typedef struct {
    const char *lock; /* path of the file that says "a tracker runs" */
    char **arguments;
    int null;         /* /dev/null */
    int limit;        /* of descriptors, for kernels without close_range */
} Start;

/* A fork that runs no handlers and sends nobody a SIGCHLD. */
static pid_t
fork_quietly(void)
{
    return (pid_t)syscall(SYS_clone, 0, 0, 0, 0, 0);
}

static void
close_others(int keep, int limit)
{
#if defined(SYS_close_range)
    if (syscall(SYS_close_range, keep + 1, ~0U, 0) == 0) {
        return;
    }
#endif
    for (int descriptor = keep + 1; descriptor < limit; descriptor++) {
        close(descriptor);
    }
}

#define LOCK_DESCRIPTOR 3 /* where the tracker finds its lock */

#define TRIES 20 /* ms: others who only look lock it for microseconds */

static int
lock_exclusively(int descriptor)
{
    const struct timespec pause = {0, 1000000};
    for (int tries = 0; tries < TRIES; tries++) {
        if (flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
            return 0;
        }
        (void)nanosleep(&pause, NULL);
    }
    return -1;
}

static void
become_tracker(const Start *start)
{
    static const int ignored[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM, 0};
    struct sigaction ignore, usual;
    sigset_t none;
    memset(&ignore, 0, sizeof(ignore));
    ignore.sa_handler = SIG_IGN;
    memset(&usual, 0, sizeof(usual));
    usual.sa_handler = SIG_DFL;
    int lock = open(start->lock, O_CREAT | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
    struct stat status;
    if (lock < 0 || lock_exclusively(lock) < 0 || fstat(lock, &status) < 0 || status.st_nlink == 0 ||
        fchmod(lock, 0600) < 0) {
        return; /* another one is there, or was swept away this instant: the next creation looks again */
    }
    if (setsid() < 0) {
        return;
    }
    for (const int *number = ignored; *number != 0; number++) {
        sigaction(*number, &ignore, NULL);
    }
    sigaction(SIGCHLD, &usual, NULL);
    if (fork_quietly() != 0) {
        return;
    }
    /* Both out of the way first: where the standard streams were closed, one of them has a number that is written to. */
    int null = fcntl(start->null, F_DUPFD_CLOEXEC, LOCK_DESCRIPTOR + 1);
    int held = fcntl(lock, F_DUPFD_CLOEXEC, LOCK_DESCRIPTOR + 1);
    if (null < 0 || held < 0 || chdir("/") < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 ||
        dup2(held, LOCK_DESCRIPTOR) < 0) {
        return;
    }
    close_others(LOCK_DESCRIPTOR, start->limit);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL); /* not before: see start_tracker */
    execv(start->arguments[0], start->arguments);
}

static int
start_tracker(const Start *start)
{
    /* Until it runs a program of its own a child has the handlers of this process, and the descriptor to which those of
     * Python write: a signal to the group would be noted twice. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t child = fork_quietly();
    if (child == 0) {
        become_tracker(start);
        _exit(0);
    }
    int error = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (child < 0) {
        return error;
    }
    while (waitpid(child, NULL, __WALL) < 0 && errno == EINTR) {
    }
    return 0;
}

PyObject *
system_start_tracker(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *lock = NULL, *list, *encoded = NULL, *result = NULL;
    Start start = {.null = -1};
    if (!PyArg_ParseTuple(args, "O&O!:_start_tracker", PyUnicode_FSConverter, &lock, &PyTuple_Type, &list)) {
        return NULL;
    }
    Py_ssize_t count = PyTuple_GET_SIZE(list);
    encoded = PyTuple_New(count);
    start.arguments = PyMem_Calloc((size_t)count + 1, sizeof(char *));
    if (encoded == NULL || start.arguments == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *argument;
        if (!PyUnicode_FSConverter(PyTuple_GET_ITEM(list, i), &argument)) {
            goto done;
        }
        PyTuple_SET_ITEM(encoded, i, argument);
        start.arguments[i] = PyBytes_AS_STRING(argument);
    }
    start.lock = PyBytes_AS_STRING(lock);
    start.limit = (int)sysconf(_SC_OPEN_MAX);
    start.null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (start.null < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        goto done;
    }
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = start_tracker(&start);
    close(start.null);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        goto done;
    }
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(start.arguments);
    Py_XDECREF(encoded);
    Py_DECREF(lock);
    return result;
}

#endif
