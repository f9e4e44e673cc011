/* Callbacks of message queues.
 *
 * The kernel can tell of a message by a signal, or by 32 bytes into a netlink socket, which is what the C library
 * builds SIGEV_THREAD upon; see mq_notify(2). This file does so too, but with a socket and a thread for each
 * notification: then every registration gets exactly one answer, "fired" or "removed", and whoever holds its memory
 * knows when it is over. The C library cannot tell whether a callback that was cancelled is still on its way.
 *
 * A Notification belongs to its thread, which frees it. The references to Python objects in it belong to the registry,
 * and then to whoever takes them out first: the thread, when it is about to call; the one who cancels or replaces; or
 * the interpreter at its end. A thread that finds them gone touches nothing of Python.
 *
 * The kernel removes a registration when its process closes any descriptor of the queue, be it of another handle. A
 * thread that hears "removed" while the references are still there knows that nobody meant it, and registers again. It
 * needs the interpreter for that. If there are messages by then, one of them may have come into the empty queue meanwhile,
 * so the callback runs: once too often is better than never.
 */
#include "ext.h"

#if HAVE_MESSAGE_QUEUES

#include <errno.h>
#include <linux/netlink.h>
#include <mqueue.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Of the kernel's include/linux/mqueue.h, which is not for user space although its values are. */
#define COOKIE_SIZE 32
#define COOKIE_FIRED 1 /* in the last byte; removed: 2 */

typedef enum { PHASE_PREPARED, PHASE_ARMED, PHASE_ABANDONED } Phase;

typedef struct Notification {
    Notifier *notifier;
    struct Notification *next; /* in the registry, as long as that holds the references */
    References references;
    Identity queue; /* which one; there may be several handles */
    Phase phase;
    int socket;
    Identity socket_identity; /* somebody may close all descriptors, and its number become a stranger's */
    sigset_t signals;         /* the mask that the callback runs under */
} Notification;

/* The registry of one interpreter in one process. No Python function is called while its lock is held, not even one that
 * allocates: under tracemalloc that waits for the interpreter lock, whose holder may be waiting for this one. */
struct Notifier {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned users;    /* the module, and each thread */
    unsigned entering; /* threads on their way into the interpreter */
    unsigned running;  /* threads in it */
    bool stopped;      /* as the module state says, which a thread cannot ask: it may be gone */
    pid_t pid;
    PyInterpreterState *interpreter;
    Notification *armed;
};

/* ---- the registry ---- */

/* NULL: no memory. */
static Notifier *
notifier_new(void)
{
    Notifier *notifier = PyMem_RawCalloc(1, sizeof(*notifier));
    if (notifier == NULL) {
        return NULL;
    }
    pthread_mutex_init(&notifier->lock, NULL); /* with default attributes neither can fail on Linux */
    pthread_cond_init(&notifier->changed, NULL);
    notifier->users = 1;
    notifier->pid = getpid();
    notifier->interpreter = PyInterpreterState_Get();
    return notifier;
}

/* If not, it is the parent's, and its lock may be held for ever in this child. */
static bool
is_ours(const Notifier *notifier)
{
    return notifier->pid == getpid();
}

void
notifier_release(Notifier *notifier)
{
    if (notifier == NULL || !is_ours(notifier)) {
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    bool last = --notifier->users == 0;
    pthread_mutex_unlock(&notifier->lock);
    if (last) {
        pthread_mutex_destroy(&notifier->lock);
        pthread_cond_destroy(&notifier->changed);
        PyMem_RawFree(notifier);
    }
}

/* This process's registry, or NULL. A forked child leaves its parent's alone: the threads are not there, and what the
 * lock protects may be half changed. */
static Notifier *
notifier_existing(State *state)
{
    Notifier *notifier = atomic_load(&state->notifier);
    return notifier != NULL && is_ours(notifier) ? notifier : NULL;
}

static Notifier *
notifier_get(State *state)
{
    Notifier *current = notifier_existing(state);
    if (current != NULL) {
        return current;
    }
    Notifier *fresh = notifier_new();
    if (fresh == NULL) {
        return NULL;
    }
    current = atomic_load(&state->notifier);
    if (notifier_existing(state) == NULL && atomic_compare_exchange_strong(&state->notifier, &current, fresh)) {
        return fresh;
    }
    notifier_release(fresh); /* another thread was quicker */
    return notifier_existing(state);
}

void
references_drop(References *references)
{
    Py_CLEAR(references->queue);
    Py_CLEAR(references->callback);
    Py_CLEAR(references->param);
}

/* All of these under the lock. */

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
take_by_identity_locked(Notifier *notifier, const Identity *queue, References *references)
{
    for (Notification *notification = notifier->armed; notification != NULL; notification = notification->next) {
        if (identity_same_object(&notification->queue, queue)) {
            take_locked(notification, references); /* there is only one: each replaces the one before */
            return;
        }
    }
}

static bool
take_by_handle_locked(Notifier *notifier, PyObject *queue, References *references)
{
    for (Notification *notification = notifier->armed; notification != NULL; notification = notification->next) {
        if (notification->references.queue == queue) {
            return take_locked(notification, references);
        }
    }
    return false;
}

/* 0 or an errno. The C library's mq_notify would not pass a socket on. */
static int
mq_notify_call(int mqd, const struct sigevent *event)
{
    return syscall(SYS_mq_notify, mqd, event) < 0 ? errno : 0;
}

static int
register_socket_locked(Notification *notification, int mqd)
{
    static const char cookie[COOKIE_SIZE];
    struct sigevent event;
    memset(&event, 0, sizeof(event));
    event.sigev_notify = SIGEV_THREAD;
    event.sigev_signo = notification->socket;
    event.sigev_value.sival_ptr = (void *)cookie; /* only read */
    return mq_notify_call(mqd, &event);
}

/* ---- cancelling ---- */

int
notification_replace(State *state, int mqd, const Identity *queue, const struct sigevent *event, References *replaced)
{
    Notifier *notifier = notifier_existing(state);
    if (notifier != NULL) {
        pthread_mutex_lock(&notifier->lock);
    }
    int error = mq_notify_call(mqd, NULL); /* a process replaces its own notification */
    if (error == 0 && event != NULL) {
        error = mq_notify_call(mqd, event);
    }
    if (notifier != NULL) {
        if (error == 0) {
            take_by_identity_locked(notifier, queue, replaced);
        }
        pthread_mutex_unlock(&notifier->lock);
    }
    return error;
}

void
notification_cancel(State *state, PyObject *queue, int mqd, References *cancelled)
{
    Notifier *notifier = notifier_existing(state);
    if (notifier == NULL) {
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    if (take_by_handle_locked(notifier, queue, cancelled) && mqd >= 0) {
        (void)mq_notify_call(mqd, NULL);
    }
    pthread_mutex_unlock(&notifier->lock);
}

/* A new reference to the queue of any armed notification, or NULL. */
static PyObject *
any_queue(Notifier *notifier)
{
    pthread_mutex_lock(&notifier->lock);
    PyObject *queue = notifier->armed != NULL ? notifier->armed->references.queue : NULL;
    Py_XINCREF(queue);
    pthread_mutex_unlock(&notifier->lock);
    return queue;
}

void
notifier_stop(State *state)
{
    atomic_store(&state->notifications_stopped, true); /* also for a registry that is made after this */
    Notifier *notifier = notifier_existing(state);
    if (notifier == NULL) {
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    notifier->stopped = true;
    pthread_mutex_unlock(&notifier->lock);
    PyObject *queue;
    while ((queue = any_queue(notifier)) != NULL) {
        message_queue_cancel(state, queue);
        Py_DECREF(queue);
    }
    /* Who is on the way in finds nothing to do, and is out soon. Who runs a callback: the end of a subinterpreter under a
     * thread of its own is a fatal error; the main interpreter ends with the process, there a callback is like a daemon
     * thread, and nobody waits for it. */
    bool wait_for_all = notifier->interpreter != PyInterpreterState_Main();
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&notifier->lock);
    while (notifier->entering != 0 || (wait_for_all && notifier->running != 0)) {
        pthread_cond_wait(&notifier->changed, &notifier->lock);
    }
    pthread_mutex_unlock(&notifier->lock);
    Py_END_ALLOW_THREADS
}

/* ---- the thread of one notification ---- */

static bool
wait_until_armed(Notification *notification)
{
    Notifier *notifier = notification->notifier;
    pthread_mutex_lock(&notifier->lock);
    while (notification->phase == PHASE_PREPARED) {
        pthread_cond_wait(&notifier->changed, &notifier->lock);
    }
    pthread_mutex_unlock(&notifier->lock);
    return notification->phase == PHASE_ARMED;
}

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

/* A thread state, attached; NULL when there is nothing to do: then the interpreter, which may be gone, is not touched. */
static PyThreadState *
enter_interpreter(Notification *notification)
{
    Notifier *notifier = notification->notifier;
    References lost;
    pthread_mutex_lock(&notifier->lock);
    bool wanted = notification->references.queue != NULL && !notifier->stopped;
    notifier->entering += wanted;
    pthread_mutex_unlock(&notifier->lock);
    if (!wanted) {
        return NULL;
    }
    PyThreadState *thread = PyThreadState_New(notifier->interpreter);
    if (thread != NULL) {
        PyEval_RestoreThread(thread); /* does not come back when the interpreter has ended meanwhile */
    }
    pthread_mutex_lock(&notifier->lock);
    if (thread == NULL) {
        take_locked(notification, &lost); /* no memory, so nobody can release them */
    }
    notifier->entering--;
    notifier->running += thread != NULL;
    pthread_cond_broadcast(&notifier->changed);
    pthread_mutex_unlock(&notifier->lock);
    return thread;
}

static void
leave_interpreter(Notifier *notifier, PyThreadState *thread)
{
    PyThreadState_Clear(thread);
    PyThreadState_DeleteCurrent();
    if (!is_ours(notifier)) { /* the callback has forked, and this is the child */
        return;
    }
    pthread_mutex_lock(&notifier->lock);
    notifier->running--;
    pthread_cond_broadcast(&notifier->changed);
    pthread_mutex_unlock(&notifier->lock);
}

typedef enum { ARMED_AGAIN, MISSED_MESSAGE, GONE } Again;

/* After a "removed" that nobody here meant. */
static Again
register_again(Notification *notification)
{
    Notifier *notifier = notification->notifier;
    pthread_mutex_lock(&notifier->lock);
    PyObject *queue = notification->references.queue;
    Py_XINCREF(queue);
    pthread_mutex_unlock(&notifier->lock);
    if (queue == NULL) {
        return GONE;
    }
    Again again = GONE;
    int mqd;
    struct mq_attr attributes;
    Handle *pinned = message_queue_pin(queue, &mqd);
    if (pinned != NULL && identity_same_object(&pinned->identity, &notification->queue) && /* __init__ may change it */
        identity_leads_to(notification->socket, &notification->socket_identity)) {
        pthread_mutex_lock(&notifier->lock);
        /* Not if it is taken: then another interpreter of this process, or another process, was told instead. */
        if (notification->references.queue != NULL && register_socket_locked(notification, mqd) == 0) {
            again = ARMED_AGAIN;
            if (mq_getattr(mqd, &attributes) < 0 || attributes.mq_curmsgs != 0) {
                again = MISSED_MESSAGE;
                (void)mq_notify_call(mqd, NULL);
            }
        }
        pthread_mutex_unlock(&notifier->lock);
    }
    if (pinned != NULL) {
        message_queue_unpin(queue, pinned);
    }
    Py_DECREF(queue);
    return again;
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

/* In the interpreter: true if the notification is armed again and goes on waiting. */
static bool
settle(Notification *notification, bool fired)
{
    References references = {NULL, NULL, NULL};
    if (!fired) {
        Again again = register_again(notification);
        if (again == ARMED_AGAIN) {
            return true;
        }
        fired = again == MISSED_MESSAGE;
    }
    pthread_mutex_lock(&notification->notifier->lock);
    bool taken = take_locked(notification, &references);
    pthread_mutex_unlock(&notification->notifier->lock);
    if (taken && fired) {
        pthread_sigmask(SIG_SETMASK, &notification->signals, NULL);
        run_callback(&references);
    }
    references_drop(&references);
    return false;
}

static void
free_notification(Notification *notification)
{
    if (identity_leads_to(notification->socket, &notification->socket_identity)) {
        close(notification->socket);
    }
    PyMem_RawFree(notification);
}

static void
run_notification(void *argument)
{
    Notification *notification = argument;
    Notifier *notifier = notification->notifier;
    bool waiting = wait_until_armed(notification);
    while (waiting) {
        bool fired = wait_for_message(notification->socket);
        PyThreadState *thread = enter_interpreter(notification);
        if (thread == NULL) {
            break;
        }
        waiting = settle(notification, fired);
        leave_interpreter(notifier, thread);
    }
    free_notification(notification);
    notifier_release(notifier);
}

/* ---- arming ---- */

/* Makes the thread, with all signals blocked while it waits: they are for others. */
static bool
start_thread(Notification *notification)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &notification->signals);
    unsigned long thread = PyThread_start_new_thread(run_notification, notification);
    pthread_sigmask(SIG_SETMASK, &notification->signals, NULL); /* still there: it waits to be armed or abandoned */
    return thread != PYTHREAD_INVALID_THREAD_ID;
}

/* A notification with its socket and its thread, which waits to be armed or abandoned. 0 or an errno; *failed is the call
 * that did. */
static int
prepare(Notifier *notifier, const Identity *queue, Notification **prepared, const char **failed)
{
    FileFacts facts;
    int error = ENOMEM;
    *failed = "malloc";
    Notification *notification = notifier != NULL ? PyMem_RawCalloc(1, sizeof(*notification)) : NULL;
    if (notification == NULL) {
        return error;
    }
    notification->notifier = notifier;
    notification->queue = *queue;
    *failed = "socket";
    notification->socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (notification->socket < 0 || identity_facts(notification->socket, &facts) < 0) {
        error = errno;
        goto error;
    }
    notification->socket_identity = facts.identity;
    pthread_mutex_lock(&notifier->lock);
    notifier->users++;
    pthread_mutex_unlock(&notifier->lock);
    if (!start_thread(notification)) {
        notifier_release(notifier);
        *failed = "pthread_create";
        error = EAGAIN;
        goto error;
    }
    *prepared = notification;
    return 0;
error:
    if (notification->socket >= 0) {
        close(notification->socket);
    }
    PyMem_RawFree(notification);
    return error;
}

/* Replaces what this process asked for. 0 or an errno; ECANCELED: the interpreter is ending. The kernel has to forget the
 * old registration before it takes a new one. If it then does not, the thread of an old callback, which has kept its
 * references, hears "removed" and registers again; a signal that was asked for is lost. The thread may free the
 * notification as soon as this has been called. */
static int
arm(State *state, Notification *notification, int mqd, References *references, References *replaced)
{
    Notifier *notifier = notification->notifier;
    int error = ECANCELED;
    pthread_mutex_lock(&notifier->lock);
    if (!atomic_load(&state->notifications_stopped)) {
        error = mq_notify_call(mqd, NULL);
        if (error == 0) {
            error = register_socket_locked(notification, mqd);
        }
    }
    if (error == 0) {
        take_by_identity_locked(notifier, &notification->queue, replaced);
        notification->references = *references;
        notification->next = notifier->armed;
        notifier->armed = notification;
    }
    notification->phase = error == 0 ? PHASE_ARMED : PHASE_ABANDONED;
    pthread_cond_broadcast(&notifier->changed);
    pthread_mutex_unlock(&notifier->lock);
    return error;
}

int
notification_arm(State *state, PyObject *queue, int mqd, const Identity *identity, PyObject *callback, PyObject *param,
                 References *replaced, const char **failed)
{
    Notification *notification = NULL;
    int error = prepare(notifier_get(state), identity, &notification, failed);
    if (error != 0) {
        return error;
    }
    *failed = "mq_notify";
    References references = {Py_NewRef(queue), Py_NewRef(callback), Py_NewRef(param)};
    error = arm(state, notification, mqd, &references, replaced);
    if (error != 0) {
        references_drop(&references); /* of what the caller holds too: no code runs */
    }
    return error;
}

void
notification_raise(State *state, int error, const char *failed, PyObject *name)
{
    if (error == ECANCELED) {
        raise_error(state->Error, 0, name, "mq_notify(%R): the interpreter is ending, no callback can run", name);
    }
    else if (strcmp(failed, "malloc") == 0) {
        PyErr_NoMemory();
    }
    else if (strcmp(failed, "pthread_create") == 0) {
        char limit[256];
        limit_describe(limit, sizeof(limit), failed, error);
        PyObject *message = PyUnicode_FromFormat("mq_notify(%R): cannot start a thread for the callback%s", name, limit);
        if (message != NULL) {
            raise_os_error(error, name, message);
            Py_DECREF(message);
        }
    }
    else {
        raise_errno(state, error, failed, name, error == EBUSY ? "another process is notified already" : NULL);
    }
}

#endif
