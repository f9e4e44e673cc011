/* Callbacks of message queues.
 *
 * The kernel can tell of a message by a signal, or by 32 bytes into a netlink socket, which is what the C library
 * builds SIGEV_THREAD upon; see mq_notify(2). This file does so too, but with a socket and a thread for each
 * notification: then every one of them gets exactly one message, "fired" or "removed", and whoever holds its memory
 * knows when it is over. The C library cannot tell whether a callback that was cancelled is still on its way.
 *
 * A Notification belongs to its thread, which frees it. The references to Python objects in it belong to whoever takes
 * them out first, under the lock of the registry: the thread, when the message has come; the one who cancels; or the
 * interpreter at its end. A thread that finds them gone touches nothing of Python.
 */
#include "ext.h"

#if HAVE_MESSAGE_QUEUES

#include <errno.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Of the kernel's include/linux/mqueue.h, which is not for user space although its values are. */
#define COOKIE_SIZE 32
#define COOKIE_FIRED 1 /* in the last byte; removed: 2 */

typedef struct {
    PyObject *queue;
    PyObject *callback;
    PyObject *param;
} References;

typedef struct Notification {
    Notifier *notifier;
    struct Notification *next; /* in the registry, as long as it holds the references */
    References references;
    int socket;
    sigset_t signals; /* the mask that the callback runs under */
} Notification;

/* The registry of one interpreter in one process. */
struct Notifier {
    pthread_mutex_t lock;
    pthread_cond_t idle;
    unsigned users; /* the module, and each thread */
    unsigned running;
    bool stopped;
    pid_t pid;
    PyInterpreterState *interpreter;
    Notification *armed;
};

/* ---- the registry ---- */

Notifier *
notifier_new(void)
{
    Notifier *notifier = PyMem_RawCalloc(1, sizeof(*notifier));
    if (notifier == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    pthread_mutex_init(&notifier->lock, NULL); /* with default attributes neither can fail on Linux */
    pthread_cond_init(&notifier->idle, NULL);
    notifier->users = 1;
    notifier->pid = getpid();
    notifier->interpreter = PyInterpreterState_Get();
    return notifier;
}

void
notifier_release(Notifier *notifier)
{
    if (notifier == NULL || notifier->pid != getpid()) { /* the parent's: its lock may be held for ever in this child */
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    bool last = --notifier->users == 0;
    pthread_mutex_unlock(&notifier->lock);
    if (last) {
        pthread_mutex_destroy(&notifier->lock);
        pthread_cond_destroy(&notifier->idle);
        PyMem_RawFree(notifier);
    }
}

/* This process's registry. A forked child leaves its parent's alone: the threads are not there, and what the lock
 * protects may be half changed. */
static Notifier *
notifier_get(State *state)
{
    Notifier *current = atomic_load(&state->notifier);
    if (current != NULL && current->pid == getpid()) {
        return current;
    }
    Notifier *fresh = notifier_new();
    if (fresh == NULL) {
        return NULL;
    }
    if (atomic_compare_exchange_strong(&state->notifier, &current, fresh)) {
        return fresh;
    }
    notifier_release(fresh); /* another thread was quicker */
    return current;
}

static void
drop(References references)
{
    Py_XDECREF(references.queue);
    Py_XDECREF(references.callback);
    Py_XDECREF(references.param);
}

/* Both under the lock: finds a notification of `queue` (of any, if NULL); takes the references out of one. */

static Notification *
find_locked(Notifier *notifier, PyObject *queue)
{
    Notification *notification = notifier->armed;
    while (notification != NULL && queue != NULL && notification->references.queue != queue) {
        notification = notification->next;
    }
    return notification;
}

static bool
take_locked(Notification *notification, References *references)
{
    if (notification->references.queue == NULL) {
        return false; /* somebody else did */
    }
    Notification **link = &notification->notifier->armed;
    while (*link != notification) {
        link = &(*link)->next;
    }
    *link = notification->next;
    *references = notification->references;
    memset(&notification->references, 0, sizeof(notification->references));
    return true;
}

static void
cancel_all(Notifier *notifier, PyObject *queue)
{
    Notification *notification;
    do {
        References references = {NULL, NULL, NULL};
        pthread_mutex_lock(&notifier->lock);
        notification = find_locked(notifier, queue);
        if (notification != NULL) {
            take_locked(notification, &references);
        }
        pthread_mutex_unlock(&notifier->lock);
        drop(references); /* may run Python code, so the lock is not held and the search begins anew */
    } while (notification != NULL);
}

void
notification_cancel(State *state, PyObject *queue)
{
    Notifier *notifier = atomic_load(&state->notifier);
    if (notifier != NULL && notifier->pid == getpid()) {
        cancel_all(notifier, queue);
    }
}

void
notifier_stop(State *state)
{
    Notifier *notifier = atomic_load(&state->notifier);
    if (notifier == NULL || notifier->pid != getpid()) {
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    notifier->stopped = true;
    pthread_mutex_unlock(&notifier->lock);
    cancel_all(notifier, NULL);
    /* An interpreter that ends under a thread of its own is a fatal error. The main interpreter ends with the process:
     * there a callback is like a daemon thread, and nobody waits for it. */
    if (notifier->interpreter != PyInterpreterState_Main()) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&notifier->lock);
        while (notifier->running != 0) {
            pthread_cond_wait(&notifier->idle, &notifier->lock);
        }
        pthread_mutex_unlock(&notifier->lock);
        Py_END_ALLOW_THREADS
    }
}

/* ---- the thread of one notification ---- */

static bool
wait_for_message(int descriptor)
{
    unsigned char cookie[COOKIE_SIZE];
    ssize_t length;
    do {
        length = recv(descriptor, cookie, sizeof(cookie), 0);
    } while (length < 0 && errno == EINTR);
    return length == COOKIE_SIZE && cookie[COOKIE_SIZE - 1] == COOKIE_FIRED;
}

/* Takes the references and makes a thread state, both or none: an interpreter that has stopped its registry, or is
 * gone, is not touched. */
static PyThreadState *
enter_interpreter(Notification *notification, References *references)
{
    Notifier *notifier = notification->notifier;
    PyThreadState *thread = NULL;
    pthread_mutex_lock(&notifier->lock);
    if (notification->references.queue != NULL) {
        thread = PyThreadState_New(notifier->interpreter);
        if (thread != NULL) {
            take_locked(notification, references);
            notifier->running++;
        }
    }
    pthread_mutex_unlock(&notifier->lock);
    return thread;
}

static void
leave_interpreter(Notifier *notifier, PyThreadState *thread)
{
    PyThreadState_Clear(thread);
    PyThreadState_DeleteCurrent();
    pthread_mutex_lock(&notifier->lock);
    notifier->running--;
    pthread_cond_broadcast(&notifier->idle);
    pthread_mutex_unlock(&notifier->lock);
}

static void
run_callback(const References *references)
{
    PyObject *result = PyObject_CallOneArg(references->callback, references->param);
    if (result == NULL) {
        PyErr_WriteUnraisable(references->callback);
    }
    Py_XDECREF(result);
}

static void
run_notification(void *argument)
{
    Notification *notification = argument;
    Notifier *notifier = notification->notifier;
    References references = {NULL, NULL, NULL};
    bool fired = wait_for_message(notification->socket);
    close(notification->socket);
    PyThreadState *thread = enter_interpreter(notification, &references);
    if (thread != NULL) {
        pthread_sigmask(SIG_SETMASK, &notification->signals, NULL);
        PyEval_RestoreThread(thread); /* does not come back when the interpreter ends meanwhile */
        if (fired) {
            run_callback(&references);
        }
        drop(references);
        leave_interpreter(notifier, thread);
    }
    PyMem_RawFree(notification);
    notifier_release(notifier);
}

/* ---- arming ---- */

/* 0 or an errno. The C library's mq_notify would not pass the socket on. */
static int
register_socket(int mqd, int descriptor)
{
    static const char cookie[COOKIE_SIZE];
    struct sigevent event;
    memset(&event, 0, sizeof(event));
    event.sigev_notify = SIGEV_THREAD;
    event.sigev_signo = descriptor;
    event.sigev_value.sival_ptr = (void *)cookie; /* only read */
    if (syscall(SYS_mq_notify, mqd, NULL) < 0 || /* a process replaces its own notification */
        syscall(SYS_mq_notify, mqd, &event) < 0) {
        return errno;
    }
    return 0;
}

/* A thread for the notification, with all signals blocked while it waits: they are for others. */
static bool
start_thread(Notification *notification)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &notification->signals);
    sigset_t signals = notification->signals; /* the thread may be over, and have freed it, before the next line */
    unsigned long thread = PyThread_start_new_thread(run_notification, notification);
    pthread_sigmask(SIG_SETMASK, &signals, NULL);
    return thread != PYTHREAD_INVALID_THREAD_ID;
}

static Notification *
new_notification(State *state, Notifier *notifier, PyObject *name)
{
    Notification *notification = PyMem_RawCalloc(1, sizeof(*notification));
    if (notification == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    notification->notifier = notifier;
    notification->socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (notification->socket < 0) {
        raise_errno(state, errno, "socket", name, NULL);
        PyMem_RawFree(notification);
        return NULL;
    }
    return notification;
}

/* Puts it into the registry with new references; not when the interpreter is ending. */
static bool
enlist(Notification *notification, PyObject *queue, PyObject *callback, PyObject *param)
{
    Notifier *notifier = notification->notifier;
    pthread_mutex_lock(&notifier->lock);
    bool stopped = notifier->stopped;
    if (!stopped) {
        notification->references = (References){Py_NewRef(queue), Py_NewRef(callback), Py_NewRef(param)};
        notification->next = notifier->armed;
        notifier->armed = notification;
        notifier->users++;
    }
    pthread_mutex_unlock(&notifier->lock);
    return !stopped;
}

/* The reverse, where no thread has been started. */
static void
discard(Notification *notification)
{
    Notifier *notifier = notification->notifier;
    References references = {NULL, NULL, NULL};
    pthread_mutex_lock(&notifier->lock);
    take_locked(notification, &references);
    notifier->users--;
    pthread_mutex_unlock(&notifier->lock);
    close(notification->socket);
    PyMem_RawFree(notification);
    drop(references);
}

int
notification_arm(State *state, PyObject *queue, int mqd, PyObject *name, PyObject *callback, PyObject *param)
{
    Notifier *notifier = notifier_get(state);
    Notification *notification = notifier != NULL ? new_notification(state, notifier, name) : NULL;
    if (notification == NULL) {
        return -1;
    }
    if (!enlist(notification, queue, callback, param)) {
        close(notification->socket);
        PyMem_RawFree(notification);
        raise_error(state->Error, 0, name, "mq_notify(%R): the interpreter is ending, no callback can run", name);
        return -1;
    }
    int error = register_socket(mqd, notification->socket);
    if (error != 0) {
        discard(notification);
        raise_errno(state, error, "mq_notify", name, error == EBUSY ? "another process is notified already" : NULL);
        return -1;
    }
    if (!start_thread(notification)) {
        syscall(SYS_mq_notify, mqd, NULL);
        discard(notification);
        PyErr_SetString(PyExc_RuntimeError, "mq_notify: cannot start a thread for the callback");
        return -1;
    }
    return 0;
}

#endif
