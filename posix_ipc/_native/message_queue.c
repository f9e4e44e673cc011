/* posix_ipc.MessageQueue: mq_open(3), mq_send(3), mq_receive(3), mq_notify(3). See mq_overview(7). */
#include "ext.h"

#if HAVE_MESSAGE_QUEUES

#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    NamedObject head;
    Handle *handle; /* NULL: closed, or never opened */
    long max_messages;
    long max_message_size;
    bool read;
    bool write;
    PyObject *spare; /* bytes of max_message_size, private, for the next receive(); or NULL */
} MessageQueueObject;

/* ---- lifetime ---- */

static PyObject *
message_queue_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    return type->tp_alloc(type, 0); /* arguments are the concern of __init__: see semaphore_new */
}

/* Not what became a stranger's because somebody closed the descriptor behind our back. */
static void
release_handle(Handle *handle)
{
    if (!handle->keep_open && identity_leads_to(handle->descriptor, &handle->identity)) {
        mq_close(handle->descriptor);
    }
}

static void
message_queue_dealloc(PyObject *op)
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    named_begin_dealloc(&self->head);
    if (self->handle != NULL) {
#if HAVE_TRACKING
        tracked_forget_if_gone(&self->head, self->handle->descriptor);
#endif
        self->handle->keep_open = !self->head.owned; /* a constructor's descriptor is the caller's: see shared_memory.c */
        handle_free(self->handle);
    }
    Py_CLEAR(self->spare);
    named_end_dealloc(&self->head);
}

typedef struct {
    const char *name;
    int flags;
    mode_t mode;
    int64_t max_messages;
    int64_t max_message_size;
    bool read;
    bool write;
    /* results */
    mqd_t descriptor;
    struct mq_attr attributes;
    FileFacts facts;
    bool created;
    const char *failed; /* the call that did */
} OpenRequest;

/* 0 or an errno. Tells, as mq_open alone does not, whether the queue is new. */
static int
open_or_create(OpenRequest *request)
{
    int flags = (request->read ? (request->write ? O_RDWR : O_RDONLY) : O_WRONLY) | O_CLOEXEC |
                (request->flags & O_NONBLOCK);
    struct mq_attr wanted = {.mq_maxmsg = (long)request->max_messages, .mq_msgsize = (long)request->max_message_size};
    request->failed = "mq_open";
    request->created = false;
    for (;;) { /* somebody may create or unlink it between the two */
        if (!(request->flags & O_CREAT) || !(request->flags & O_EXCL)) {
            request->descriptor = mq_open(request->name, flags);
            if (request->descriptor != (mqd_t)-1) {
                return 0;
            }
            if (errno != ENOENT || !(request->flags & O_CREAT)) {
                return errno;
            }
        }
        request->descriptor = mq_open(request->name, flags | O_CREAT | O_EXCL, request->mode, &wanted);
        if (request->descriptor != (mqd_t)-1) {
            request->created = true;
            return 0;
        }
        if (errno != EEXIST || (request->flags & O_EXCL)) {
            return errno;
        }
    }
}

/* 0 or an errno. */
static int
open_queue(OpenRequest *request)
{
    int error = open_or_create(request);
    if (error != 0) {
        return error;
    }
    if (mq_getattr(request->descriptor, &request->attributes) < 0) {
        error = errno;
        request->failed = "mq_getattr";
    }
    else if (identity_facts(request->descriptor, &request->facts) < 0) {
        error = errno;
        request->failed = "fstat";
    }
    if (error != 0) {
        if (request->created) { /* it is ours, and nobody hears of it */
            mq_unlink(request->name);
        }
        mq_close(request->descriptor);
        request->descriptor = -1;
    }
    return error;
}

static int
check_access(const OpenRequest *request)
{
    if (!request->read && !request->write) {
        PyErr_SetString(PyExc_ValueError, "read and write are both False: one of them must be True");
        return -1;
    }
    return 0;
}

static int
check_name(PyObject *name, PyObject *encoded)
{
    const char *text = PyBytes_AS_STRING(encoded);
    if (text[0] != '/' || text[1] == '\0') {
        PyErr_Format(PyExc_ValueError, "mq_open(%R): the name of a queue is a slash and at least one character", name);
        return -1;
    }
    return 0;
}

static void
raise_open(State *state, int error, const OpenRequest *request, PyObject *name)
{
    char reason[320];
    bool sizes = error == EINVAL && (request->flags & O_CREAT);
    if (sizes) {
        limit_describe_queue(reason, sizeof(reason), (long)request->max_messages, (long)request->max_message_size);
    }
    raise_errno(state, error, request->failed, name, sizes ? reason : NULL);
}

/* Puts an open queue into the object, in place of what it held before. Consumes all it is given. A callback that was asked
 * for of what it held does not run any more. */
static void
install(State *state, MessageQueueObject *self, Handle *handle, const OpenRequest *request, PyObject *name,
        PyObject *encoded, mode_t mode, bool owned, Tracking tracking)
{
    message_queue_cancel(state, (PyObject *)self);
    Handle *old;
    PyObject *spare;
    bool unused = false;
    handle->descriptor = request->descriptor;
    handle->identity = request->facts.identity;
    Py_BEGIN_CRITICAL_SECTION(self);
    old = self->handle;
    if (old != NULL) {
        old->keep_open = !self->head.owned;
        unused = handle_close(old);
    }
    self->handle = handle;
    spare = self->spare;
    self->spare = NULL;
    self->max_messages = request->attributes.mq_maxmsg;
    self->max_message_size = request->attributes.mq_msgsize;
    self->read = request->read;
    self->write = request->write;
    named_swap(&self->head, &name, &encoded, mode, &request->facts.identity, owned, &tracking);
    Py_END_CRITICAL_SECTION();
    if (unused) {
        handle_free(old);
    }
    Py_XDECREF(spare);
    named_drop(name, encoded, &tracking);
}

static int
message_queue_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"name",  "flags", "mode", "max_messages", "max_message_size",
                                        "read", "write"};
    static const Signature signature = {"MessageQueue", names, 7, 1, 7};
    PyObject *bound[7];
    State *state = state_of(op);
    if (state == NULL || args_bind_init(&signature, args, kwargs, bound) < 0) {
        return -1;
    }
    int result = -1, error;
    PyObject *name = NULL, *encoded = NULL;
    Handle *handle = NULL;
    OpenRequest request = {.mode = 0600, .read = true, .write = true,
                           .max_messages = QUEUE_MAX_MESSAGES, .max_message_size = QUEUE_MAX_MESSAGE_SIZE};
    if (args_flags(bound[1], &request.flags) < 0 || args_mode(bound[2], &request.mode) < 0 ||
        args_integer(bound[3], "max_messages", 1, LONG_MAX, &request.max_messages) < 0 ||
        args_integer(bound[4], "max_message_size", 1, LONG_MAX, &request.max_message_size) < 0 ||
        args_bool(bound[5], "read", &request.read) < 0 || args_bool(bound[6], "write", &request.write) < 0 ||
        check_access(&request) < 0) {
        goto done;
    }
    handle = handle_new(release_handle);
    if (handle == NULL) {
        goto done;
    }
    do {
        Py_CLEAR(name);
        Py_CLEAR(encoded);
        if (args_name_for(bound[0], request.flags, &name, &encoded) < 0 || check_name(name, encoded) < 0 ||
            audit_open(KIND_MESSAGE_QUEUE, request.flags, name) < 0) {
            goto done;
        }
        request.name = PyBytes_AS_STRING(encoded);
        Py_BEGIN_ALLOW_THREADS
        error = open_queue(&request);
        Py_END_ALLOW_THREADS
    } while (error == EEXIST && bound[0] == Py_None);
    if (error != 0) {
        raise_open(state, error, &request, name);
        goto done;
    }
    install(state, (MessageQueueObject *)op, handle, &request, name, encoded, request.mode, false,
            (Tracking){.creator = request.created ? getpid() : 0});
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

/* 0 or an errno: opens what exists; tracked, with a lease on what still has its name. */
static int
attach_queue(OpenRequest *request, bool tracked)
{
    int error;
    do {
        error = open_queue(request);
#if HAVE_TRACKING
        if (error == 0 && tracked) {
            request->failed = "flock";
            error = lease_lock(request->descriptor);
            if (error == 0 && identity_facts(request->descriptor, &request->facts) < 0) {
                error = errno;
            }
            if (error == 0 && request->facts.links == 0) { /* removed between open and flock */
                error = ESTALE;
            }
            if (error != 0) {
                mq_close(request->descriptor);
            }
        }
#else
        (void)tracked;
#endif
    } while (error == ESTALE);
    return error;
}

/* Opens what exists, for a pickle (`wanted` is the object it must be) or, tracked, by its name alone. */
static int
attach(State *state, PyObject *op, PyObject *arg, mode_t mode, int options, const Identity *wanted)
{
    PyObject *name, *encoded;
    Handle *handle = NULL;
    bool tracked = options & OPTION_TRACKED;
    OpenRequest request = {.flags = options & OPTION_NONBLOCK ? O_NONBLOCK : 0,
                           .read = options & OPTION_READ, .write = options & OPTION_WRITE};
    int error;
    if (args_name(arg, &name, &encoded) < 0) {
        return -1;
    }
    if (check_access(&request) < 0 || check_name(name, encoded) < 0 || (handle = handle_new(release_handle)) == NULL ||
        audit_open(KIND_MESSAGE_QUEUE, 0, name) < 0) {
        goto error;
    }
    request.name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    error = attach_queue(&request, tracked);
    Py_END_ALLOW_THREADS
    if (error == ENOENT && wanted != NULL) {
        identity_raise_mismatch(state, wanted, NULL, KIND_MESSAGE_QUEUE, name);
        goto error;
    }
    if (error != 0) {
        raise_open(state, error, &request, name);
        goto error;
    }
    if (wanted != NULL && !identity_same_object(wanted, &request.facts.identity)) {
        mq_close(request.descriptor);
        identity_raise_mismatch(state, wanted, &request.facts.identity, KIND_MESSAGE_QUEUE, name);
        goto error;
    }
    install(state, (MessageQueueObject *)op, handle, &request, name, encoded, mode, true,
            (Tracking){.active = tracked});
    return 0;
error:
    PyMem_Free(handle);
    Py_DECREF(name);
    Py_DECREF(encoded);
    return -1;
}

int
message_queue_reopen(State *state, PyObject *op, PyObject *name, mode_t mode, int options, const Identity *wanted)
{
    return attach(state, op, name, mode, options, wanted);
}

/* ---- one message to or from the kernel ---- */

typedef struct {
    mqd_t descriptor;
    bool sending;
    char *buffer;
    size_t size;       /* sending: of the message, receiving: of the buffer */
    unsigned priority; /* receiving: a result */
    ssize_t received;
} Transfer;

/* All three return 0 or an errno. */

static int
transfer_forever(Transfer *transfer)
{
    if (transfer->sending) {
        return mq_send(transfer->descriptor, transfer->buffer, transfer->size, transfer->priority) < 0 ? errno : 0;
    }
    transfer->received = mq_receive(transfer->descriptor, transfer->buffer, transfer->size, &transfer->priority);
    return transfer->received < 0 ? errno : 0;
}

/* Does not wait: ETIMEDOUT where a blocking queue would, EAGAIN where the queue itself is not a blocking one. */
static int
transfer_try(Transfer *transfer)
{
    static const struct timespec past = {0, 0};
    ssize_t result;
    do {
        if (transfer->sending) {
            result = mq_timedsend(transfer->descriptor, transfer->buffer, transfer->size, transfer->priority, &past);
        }
        else {
            result = mq_timedreceive(transfer->descriptor, transfer->buffer, transfer->size, &transfer->priority, &past);
        }
    } while (result < 0 && errno == EINTR); /* nobody waited, so no wait was interrupted; the handler runs soon */
    transfer->received = result;
    return result < 0 ? errno : 0;
}

/* The kernel's own deadlines follow a clock that somebody may set, so a limited wait is poll(2) and a try, again and
 * again: the one that polled may find that another was quicker. */
static int
transfer_wait(Transfer *transfer, int64_t timeout)
{
    if (timeout == FOREVER) {
        return transfer_forever(transfer);
    }
    struct timespec deadline = clock_after(CLOCK_MONOTONIC, timeout);
    struct pollfd waiting = {.fd = transfer->descriptor, .events = transfer->sending ? POLLOUT : POLLIN};
    for (;;) {
        int64_t remaining = clock_remaining(CLOCK_MONOTONIC, &deadline);
        if (remaining <= 0) {
            return ETIMEDOUT;
        }
        struct timespec time = {.tv_sec = (time_t)(remaining / 1000000000), .tv_nsec = (long)(remaining % 1000000000)};
        if (ppoll(&waiting, 1, &time, NULL) < 0) {
            return errno;
        }
        int error = transfer_try(transfer);
        if (error != ETIMEDOUT) {
            return error;
        }
    }
}

static bool
would_wait(int error, int64_t timeout)
{
    return error == ETIMEDOUT && timeout != 0;
}

static int
transfer_pinned(MessageQueueObject *self, Handle *handle, Transfer *transfer, int64_t timeout)
{
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = transfer_wait(transfer, timeout);
    Py_END_ALLOW_THREADS
    handle_unpin(&self->head, handle);
    return error;
}

static PyObject *
raise_transfer(MessageQueueObject *self, int error, bool sending)
{
    const char *reason = NULL;
    if (error == EAGAIN || error == ETIMEDOUT) {
        reason = sending ? "the queue is full" : "the queue is empty";
    }
    return named_raise(&self->head, error, sending ? "mq_send" : "mq_receive", reason);
}

/* ---- send ---- */

static int
send_bytes(MessageQueueObject *self, Transfer *transfer, int64_t timeout)
{
    int error = 0;
    long limit = 0;
    bool writable = false;
    Handle *pinned = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    Handle *handle = self->handle;
    limit = self->max_message_size;
    writable = self->write;
    if (handle == NULL) {
        error = EBADF;
    }
    else if (!writable) {
        error = EPERM;
    }
    else if (transfer->size > (size_t)limit) {
        error = EMSGSIZE;
    }
    else {
        transfer->descriptor = handle->descriptor;
        error = transfer_try(transfer);
        if (would_wait(error, timeout)) {
            handle_pin(handle);
            pinned = handle;
        }
    }
    Py_END_CRITICAL_SECTION();
    if (pinned != NULL) {
        error = transfer_pinned(self, pinned, transfer, timeout);
    }
    if (error == 0) {
        return 0;
    }
    if (error == EMSGSIZE) {
        char reason[100];
        PyOS_snprintf(reason, sizeof(reason), "the message has %zu bytes, max_message_size is %ld", transfer->size, limit);
        named_raise(&self->head, EMSGSIZE, "mq_send", reason);
    }
    else if (error == EPERM) {
        named_raise(&self->head, EPERM, "mq_send", "this handle was opened with write=False");
    }
    else {
        raise_transfer(self, error, true);
    }
    return -1;
}

PyDoc_STRVAR(send_doc,
"send($self, /, message, timeout=None, priority=0)\n--\n\n"
"Put one message into the queue, waiting while it is full.\n\n"
"message: bytes-like, or a str, which is sent as UTF-8; at most max_message_size bytes, empty is allowed.\n"
"timeout: the longest wait in seconds, measured by a clock that nobody can set; None waits for ever, 0 never waits.\n"
"priority: 0 to QUEUE_PRIORITY_MAX; higher ones are received first.\n"
"Raises BusyError when the queue stays full, or at once when block is False; ValueError (too long, priority out of\n"
"range), TypeError, PermissionsError (opened with write=False), ExistentialError (closed), SignalError when a signal\n"
"arrives during the wait (the exception of its handler is the cause; KeyboardInterrupt passes through).\n\n"
"POSIX.1-2008: mq_send(), mq_timedsend().");

static PyObject *
message_queue_send(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"message", "timeout", "priority"};
    static const Signature signature = {"send", names, 3, 1, 3};
    PyObject *bound[3];
    int64_t timeout = FOREVER, priority = 0;
    if (args_bind(&signature, args, nargs, kwnames, bound) < 0 || args_timeout(bound[1], &timeout) < 0 ||
        args_integer(bound[2], "priority", 0, QUEUE_PRIORITY_LIMIT, &priority) < 0) {
        return NULL;
    }
    Transfer transfer = {.sending = true, .priority = (unsigned)priority};
    Py_buffer view = {.obj = NULL};
    if (PyUnicode_Check(bound[0])) {
        Py_ssize_t length;
        transfer.buffer = (char *)PyUnicode_AsUTF8AndSize(bound[0], &length);
        if (transfer.buffer == NULL) {
            return NULL;
        }
        transfer.size = (size_t)length;
    }
    else if (PyBytes_CheckExact(bound[0])) { /* cannot change or go: the caller holds it */
        transfer.buffer = PyBytes_AS_STRING(bound[0]);
        transfer.size = (size_t)PyBytes_GET_SIZE(bound[0]);
    }
    else {
        if (PyObject_GetBuffer(bound[0], &view, PyBUF_SIMPLE) < 0) {
            return NULL;
        }
        transfer.buffer = view.buf;
        transfer.size = (size_t)view.len;
    }
    int result = send_bytes((MessageQueueObject *)op, &transfer, timeout);
    if (view.obj != NULL) {
        PyBuffer_Release(&view);
    }
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- receive ---- */

/* A buffer must exist before the kernel gives a message away, and be as long as the longest message can be. It is kept
 * between calls unless that would be a burden. Both run in the critical section and no Python code. */

#define LARGEST_SPARE 65536

static PyObject *
take_buffer(MessageQueueObject *self)
{
    PyObject *buffer = self->spare;
    self->spare = NULL;
    return buffer != NULL ? buffer : PyBytes_FromStringAndSize(NULL, self->max_message_size);
}

static void
keep_buffer(MessageQueueObject *self, PyObject *buffer)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    Py_ssize_t size = PyBytes_GET_SIZE(buffer);
    /* It no longer fits if __init__ has opened another queue meanwhile. */
    if (self->spare == NULL && size == self->max_message_size && size <= LARGEST_SPARE) {
        self->spare = buffer;
        buffer = NULL;
    }
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(buffer);
}

/* The message as bytes that hold no more than itself: a copy if it is much shorter than the buffer, else, or where
 * there is no memory for a copy, the buffer cut to its length. */
static PyObject *
message_from_buffer(MessageQueueObject *self, PyObject *buffer, Py_ssize_t length)
{
    if (length <= PyBytes_GET_SIZE(buffer) / 2) {
        PyObject *copy = PyBytes_FromStringAndSize(PyBytes_AS_STRING(buffer), length);
        if (copy != NULL) {
            keep_buffer(self, buffer);
            return copy;
        }
        PyErr_Clear();
    }
    if (length != PyBytes_GET_SIZE(buffer)) {
        (void)_PyBytes_Resize(&buffer, length);
    }
    return buffer;
}

/* (message, priority). Consumes the message, which may be NULL with an exception set. */
static PyObject *
pair_with_priority(PyObject *message, unsigned priority)
{
    PyObject *number = message != NULL ? PyLong_FromUnsignedLong(priority) : NULL;
    PyObject *pair = number != NULL ? PyTuple_New(2) : NULL;
    if (pair == NULL) {
        Py_XDECREF(number);
        Py_XDECREF(message);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, message);
    PyTuple_SET_ITEM(pair, 1, number);
    return pair;
}

/* Takes a message out of the kernel: into `target`, or, if its buffer is NULL, into new bytes. 0 or an errno; ENOBUFS:
 * `target` is too short, `received` says what it takes; ENOMEM: with MemoryError set. On success *message is a reference
 * to the bytes, if any. */
static int
receive_message(MessageQueueObject *self, Transfer *transfer, int64_t timeout, PyObject **message)
{
    int error = 0;
    PyObject *bytes = NULL;
    Handle *pinned = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    Handle *handle = self->handle;
    if (handle == NULL) {
        error = EBADF;
    }
    else if (!self->read) {
        error = EPERM;
    }
    else if (transfer->buffer == NULL) {
        bytes = take_buffer(self);
        error = bytes == NULL ? ENOMEM : 0;
        transfer->buffer = bytes != NULL ? PyBytes_AS_STRING(bytes) : NULL;
        transfer->size = bytes != NULL ? (size_t)PyBytes_GET_SIZE(bytes) : 0;
    }
    else if (transfer->size < (size_t)self->max_message_size) {
        error = ENOBUFS;
        transfer->received = self->max_message_size;
    }
    if (error == 0) {
        transfer->descriptor = handle->descriptor;
        error = transfer_try(transfer);
        if (would_wait(error, timeout)) {
            handle_pin(handle);
            pinned = handle;
        }
    }
    Py_END_CRITICAL_SECTION();
    if (pinned != NULL) {
        error = transfer_pinned(self, pinned, transfer, timeout);
    }
    if (error != 0 && bytes != NULL) {
        keep_buffer(self, bytes);
    }
    else {
        *message = bytes;
    }
    return error;
}

static PyObject *
raise_receive(MessageQueueObject *self, int error, const Transfer *transfer)
{
    if (error == ENOMEM && PyErr_Occurred()) {
        return NULL;
    }
    if (error == EPERM) {
        return named_raise(&self->head, EPERM, "mq_receive", "this handle was opened with read=False");
    }
    if (error == ENOBUFS) {
        char reason[100];
        PyOS_snprintf(reason, sizeof(reason), "the buffer has %zu bytes, max_message_size is %zd", transfer->size,
                      transfer->received);
        return named_raise(&self->head, EMSGSIZE, "mq_receive", reason);
    }
    return raise_transfer(self, error, false);
}

PyDoc_STRVAR(receive_doc,
"receive($self, /, timeout=None)\n--\n\n"
"Take the oldest of the messages with the highest priority out of the queue, waiting while it is empty.\n\n"
"timeout: the longest wait in seconds, measured by a clock that nobody can set; None waits for ever, 0 never waits.\n"
"A wait with a timeout is by poll(2), for Linux's own limited waits follow a clock that can be set; who waits without one\n"
"is served first.\n"
"Returns (message, priority): bytes and int.\n"
"Raises BusyError when the queue stays empty, or at once when block is False; TypeError, PermissionsError (opened with\n"
"read=False), ExistentialError (closed), MemoryError (no buffer; then the message stays in the queue), SignalError when a signal\n"
"arrives during the wait (the exception of its handler is the cause; KeyboardInterrupt passes through).\n\n"
"POSIX.1-2008: mq_receive(), mq_timedreceive().");

static PyObject *
message_queue_receive(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"timeout"};
    static const Signature signature = {"receive", names, 1, 0, 1};
    MessageQueueObject *self = (MessageQueueObject *)op;
    PyObject *bound[1];
    int64_t timeout = FOREVER;
    if (args_bind(&signature, args, nargs, kwnames, bound) < 0 || args_timeout(bound[0], &timeout) < 0) {
        return NULL;
    }
    Transfer transfer = {.sending = false};
    PyObject *buffer;
    int error = receive_message(self, &transfer, timeout, &buffer);
    if (error != 0) {
        return raise_receive(self, error, &transfer);
    }
    return pair_with_priority(message_from_buffer(self, buffer, transfer.received), transfer.priority);
}

PyDoc_STRVAR(receive_into_doc,
"receive_into($self, /, buffer, timeout=None)\n--\n\n"
"Like receive(), but write the message into a buffer of the caller's.\n\n"
"buffer: writable, bytes-like, of max_message_size bytes at least (else ValueError).\n"
"timeout: see receive().\n"
"Returns (length, priority): the bytes that were written at the start of the buffer, and an int. Raises what receive()\n"
"raises.\n\n"
"POSIX.1-2008: mq_receive(), mq_timedreceive().");

static PyObject *
message_queue_receive_into(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"buffer", "timeout"};
    static const Signature signature = {"receive_into", names, 2, 1, 2};
    MessageQueueObject *self = (MessageQueueObject *)op;
    PyObject *bound[2], *none;
    int64_t timeout = FOREVER;
    Py_buffer view;
    if (args_bind(&signature, args, nargs, kwnames, bound) < 0 || args_timeout(bound[1], &timeout) < 0 ||
        PyObject_GetBuffer(bound[0], &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    char empty; /* a buffer without bytes may have no address, which would mean another thing */
    Transfer transfer = {.sending = false, .buffer = view.len > 0 ? view.buf : &empty, .size = (size_t)view.len};
    int error = receive_message(self, &transfer, timeout, &none);
    PyObject *result = error != 0 ? raise_receive(self, error, &transfer)
                                  : pair_with_priority(PyLong_FromSsize_t(transfer.received), transfer.priority);
    PyBuffer_Release(&view);
    return result;
}

/* ---- notification ---- */

Handle *
message_queue_pin(PyObject *op, int *descriptor)
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    Handle *handle;
    Py_BEGIN_CRITICAL_SECTION(self);
    handle = self->handle;
    if (handle != NULL) {
        handle_pin(handle);
        *descriptor = handle->descriptor;
    }
    Py_END_CRITICAL_SECTION();
    return handle;
}

void
message_queue_unpin(PyObject *op, Handle *handle)
{
    handle_unpin((NamedObject *)op, handle);
}

void
message_queue_cancel(State *state, PyObject *op)
{
    References cancelled = {NULL, NULL, NULL};
    int descriptor = -1;
    Handle *pinned = message_queue_pin(op, &descriptor);
    notification_cancel(state, op, descriptor, &cancelled);
    if (pinned != NULL) {
        message_queue_unpin(op, pinned);
    }
    references_drop(&cancelled); /* may run Python code, so nothing is pinned any more */
}

/* What request_notification was asked for. */
typedef struct {
    int signal;         /* 0: none */
    PyObject *callback; /* NULL: none; borrowed, like the parameter, from a tuple that the caller holds */
    PyObject *param;
} Request;

static int
parse_notification(PyObject *arg, PyObject *name, Request *request)
{
    if (arg == NULL || arg == Py_None) {
        return 0;
    }
    if (PyLong_Check(arg)) {
        int overflow;
        long number = PyLong_AsLongAndOverflow(arg, &overflow);
        if (overflow != 0 || number < 1 || number > SIGRTMAX) {
            PyObject *message = PyUnicode_FromString("mq_notify: there is no signal of this number");
            if (message != NULL) {
                raise_os_error(EINVAL, name, message);
                Py_DECREF(message);
            }
            return -1;
        }
        request->signal = (int)number;
        return 0;
    }
    if (PyTuple_Check(arg) && PyTuple_GET_SIZE(arg) == 2 && PyCallable_Check(PyTuple_GET_ITEM(arg, 0))) {
        request->callback = PyTuple_GET_ITEM(arg, 0);
        request->param = PyTuple_GET_ITEM(arg, 1);
        return 0;
    }
    PyErr_SetString(PyExc_ValueError, "notification must be None, a signal number, or a tuple (callable, parameter)");
    return -1;
}

/* 0 or an errno; *failed is the call that did. */
static int
ask(State *state, PyObject *op, const Handle *handle, const Request *request, References *replaced, const char **failed)
{
    if (request->callback != NULL) {
        return notification_arm(state, op, handle->descriptor, &handle->identity, request->callback, request->param,
                                replaced, failed);
    }
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = request->signal};
    *failed = "mq_notify";
    return notification_replace(state, handle->descriptor, &handle->identity, request->signal != 0 ? &event : NULL,
                                replaced);
}

PyDoc_STRVAR(request_notification_doc,
"request_notification($self, /, notification=None)\n--\n\n"
"Ask to be told, once, when a message arrives in the empty queue while nobody waits in receive() (a receive() with a\n"
"timeout does not count: see there).\n\n"
"notification: None cancels what this process asked for; an int is the number of the signal to send to this process;\n"
"a tuple (callable, parameter) has callable(parameter) run in a new thread, where it may ask again. An exception that\n"
"it raises goes to sys.unraisablehook. The queue is kept alive while its callable waits to be called.\n"
"What this process asked for before is replaced. Linux forgets a signal asked for when this process closes any handle on\n"
"the queue; a callable is asked for again then, or called at once if there are messages, for one of them may have come\n"
"meanwhile: a callable should be ready to find nothing new. Raises BusyError when another process is the one to be told,\n"
"ValueError (anything else), OSError (no such signal, or no descriptor or thread left), ExistentialError (closed), Error\n"
"(the interpreter is ending).\n\n"
"POSIX.1-2008: mq_notify().");

static PyObject *
message_queue_request_notification(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"notification"};
    static const Signature signature = {"request_notification", names, 1, 0, 1};
    MessageQueueObject *self = (MessageQueueObject *)op;
    PyObject *bound[1], *name = NULL;
    Request request = {.signal = 0};
    References replaced = {NULL, NULL, NULL};
    int descriptor, result = -1;
    State *state = state_of(op);
    if (state == NULL || args_bind(&signature, args, nargs, kwnames, bound) < 0) {
        return NULL;
    }
    named_get(&self->head, &name, NULL);
    if (parse_notification(bound[0], name, &request) == 0) {
        Handle *handle = message_queue_pin(op, &descriptor);
        if (handle == NULL) {
            named_raise(&self->head, EBADF, "mq_notify", NULL);
        }
        else {
            const char *failed;
            int error = ask(state, op, handle, &request, &replaced, &failed);
            message_queue_unpin(op, handle);
            if (error == 0) {
                result = 0;
            }
            else { /* only now: making an exception may run finalizers, which may fork */
                notification_raise(state, error, failed, name);
            }
        }
    }
    references_drop(&replaced); /* may run Python code, so nothing is pinned any more */
    Py_XDECREF(name);
    return result < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- other methods ---- */

static PyObject *
close_queue(MessageQueueObject *self, bool quiet)
{
    State *state = state_of((PyObject *)self);
    if (state == NULL) {
        return NULL;
    }
    message_queue_cancel(state, (PyObject *)self);
    Handle *handle;
    bool unused = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    handle = self->handle;
    self->handle = NULL;
    if (handle != NULL) {
#if HAVE_TRACKING
        tracked_forget_if_gone(&self->head, handle->descriptor);
#endif
        unused = handle_close(handle);
        if (!unused) {
            (void)mq_notify(handle->descriptor, NULL); /* closing does this too, but that waits for others now */
        }
    }
    Py_END_CRITICAL_SECTION();
    if (handle == NULL && !quiet) {
        return named_raise(&self->head, EBADF, "mq_close", NULL);
    }
    if (unused) {
        handle_free(handle);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Let go of the queue; it lives on, and unlink() still works here. A notification asked for is cancelled.\n\n"
"A thread that waits on this handle goes on waiting, safely. Raises ExistentialError the second time.\n\n"
"POSIX.1-2008: mq_close().");

static PyObject *
message_queue_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return close_queue((MessageQueueObject *)op, false);
}

PyDoc_STRVAR(enter_doc,
"__enter__($self, /)\n--\n\n"
"Return the queue.");

static PyObject *
message_queue_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(self);
}

PyDoc_STRVAR(exit_doc,
"__exit__($self, /, *exc_info)\n--\n\n"
"Do close(), unless that was done already.");

static PyObject *
message_queue_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return close_queue((MessageQueueObject *)op, true);
}

PyDoc_STRVAR(unlink_doc,
"unlink($self, /)\n--\n\n"
"Remove the name. The queue and its messages go when the last process has closed it.\n\n"
"Works after close() too. Raises ExistentialError when the name is gone already, PermissionsError.\n\n"
"POSIX.1-2008: mq_unlink().");

static PyObject *
message_queue_unlink(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return named_unlink((NamedObject *)self, KIND_MESSAGE_QUEUE);
}

static int
read_descriptor(MessageQueueObject *self)
{
    int descriptor;
    Py_BEGIN_CRITICAL_SECTION(self);
    descriptor = self->handle != NULL ? self->handle->descriptor : -1;
    Py_END_CRITICAL_SECTION();
    return descriptor;
}

PyDoc_STRVAR(fileno_doc,
"fileno($self, /)\n--\n\n"
"The descriptor of the queue, or -1 after close(); the same as mqd. On Linux select and selectors take it.");

static PyObject *
message_queue_fileno(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(read_descriptor((MessageQueueObject *)self));
}

/* The attributes at this instant, as 0 or an errno. */
static int
read_attributes(MessageQueueObject *self, struct mq_attr *attributes)
{
    int error;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->handle == NULL) {
        error = EBADF;
    }
    else {
        error = mq_getattr(self->handle->descriptor, attributes) < 0 ? errno : 0;
    }
    Py_END_CRITICAL_SECTION();
    return error;
}

PyDoc_STRVAR(reduce_doc,
"__reduce__($self, /)\n--\n\n"
"Pickle by name: loading opens the same queue, and raises ExistentialError if the name leads to it no more.");

static PyObject *
message_queue_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    struct mq_attr attributes;
    int options = 0;
    int error = read_attributes(self, &attributes);
    if (error != 0) {
        return named_raise(&self->head, error, "__reduce__", NULL);
    }
    Py_BEGIN_CRITICAL_SECTION(self);
    options |= self->read ? OPTION_READ : 0;
    options |= self->write ? OPTION_WRITE : 0;
    Py_END_CRITICAL_SECTION();
    options |= attributes.mq_flags & O_NONBLOCK ? OPTION_NONBLOCK : 0;
    return named_reduce(&self->head, KIND_MESSAGE_QUEUE, options);
}

static PyObject *
message_queue_repr(PyObject *op)
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    long max_messages, max_message_size;
    bool read, write;
    Py_BEGIN_CRITICAL_SECTION(self);
    max_messages = self->max_messages;
    max_message_size = self->max_message_size;
    read = self->read;
    write = self->write;
    Py_END_CRITICAL_SECTION();
    PyObject *rest = PyUnicode_FromFormat(", max_message_size=%ld, max_messages=%ld, read=%s, write=%s)",
                                          max_message_size, max_messages, read ? "True" : "False",
                                          write ? "True" : "False");
    if (rest == NULL) {
        return NULL;
    }
    PyObject *result = named_repr(&self->head, "MessageQueue", rest);
    Py_DECREF(rest);
    return result;
}

/* ---- tracked ---- */

#if HAVE_TRACKING

/* A queue gets its name and its identity at once, so what is written down before is the name and an intent, which the
 * queue shows by its sticky bit until its identity is written down too. 0 or an errno. */
static int
create_recorded(OpenRequest *request, Record *record)
{
    static const Identity unknown;
    mode_t mode = request->mode;
    request->failed = "mq_open";
    int error = record_add(record, SLOT_INTENT, KIND_MESSAGE_QUEUE, request->name, &unknown);
    if (error != 0) {
        return error;
    }
    request->mode = mode | S_ISVTX;
    do {
        error = open_queue(request);
        if (error != 0) {
            break;
        }
        request->failed = "flock";
        error = lease_lock(request->descriptor);
        if (error == 0 && identity_facts(request->descriptor, &request->facts) < 0) {
            error = errno;
        }
        if (error == 0 && request->facts.links == 0) { /* a sweep took it for what a dead process had begun */
            mq_close(request->descriptor);
            request->descriptor = -1;
            error = ESTALE;
        }
    } while (error == ESTALE);
    request->mode = mode;
    if (error != 0 && request->descriptor < 0) {
        record_remove(record);
        record_settle(record);
        return error;
    }
    if (error == 0 && !(request->facts.mode & S_IRUSR)) { /* by the umask: nobody could clean it up */
        request->failed = "umask";
        error = EACCES;
    }
    if (error == 0) {
        record_confirm(record, &request->facts.identity);
        request->failed = "fchmod";
        if (fchmod(request->descriptor, request->facts.mode & 0777) < 0) { /* as the umask left it */
            error = errno;
        }
    }
    if (error != 0) {
        /* Made by us, and marked as nobody else's; unless it lost its name while somebody kept it locked. */
        if (identity_facts(request->descriptor, &request->facts) == 0 && request->facts.links > 0) {
            mq_unlink(request->name);
        }
        record_remove(record);
        mq_close(request->descriptor);
    }
    record_settle(record);
    return error;
}

PyDoc_STRVAR(create_doc,
"_create($self, journal, name, mode, max_messages, max_message_size, read, write, block, /)\n--\n\n"
"Create a queue that this process owns. False, with nothing made, if the journal is full, or None: then only the\n"
"arguments are looked at.");

static PyObject *
message_queue_create(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    OpenRequest request = {.flags = O_CREAT | O_EXCL};
    Record record = {.index = -1};
    PyObject *name, *encoded;
    if (state == NULL || tracked_create_arguments(state, args, 5, &record.journal, &name, &encoded, &request.mode) < 0) {
        return NULL;
    }
    int error = 0;
    bool block = true;
    Handle *handle = NULL;
    if (args_integer(PyTuple_GET_ITEM(args, 3), "max_messages", 1, LONG_MAX, &request.max_messages) < 0 ||
        args_integer(PyTuple_GET_ITEM(args, 4), "max_message_size", 1, LONG_MAX, &request.max_message_size) < 0 ||
        args_bool(PyTuple_GET_ITEM(args, 5), "read", &request.read) < 0 ||
        args_bool(PyTuple_GET_ITEM(args, 6), "write", &request.write) < 0 ||
        args_bool(PyTuple_GET_ITEM(args, 7), "block", &block) < 0 || check_access(&request) < 0 ||
        check_name(name, encoded) < 0 ||
        (record.journal != NULL && audit_open(KIND_MESSAGE_QUEUE, O_CREAT, name) < 0) ||
        (handle = handle_new(release_handle)) == NULL) {
        goto error;
    }
    request.name = PyBytes_AS_STRING(encoded);
    request.flags |= block ? 0 : O_NONBLOCK;
    Py_BEGIN_ALLOW_THREADS
    error = create_recorded(&request, &record);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        if (error != NO_SLOT) {
            raise_open(state, error, &request, name);
        }
        goto error;
    }
    Py_INCREF(record.journal);
    install(state, (MessageQueueObject *)op, handle, &request, name, encoded, request.mode, true,
            (Tracking){.active = true, .record = record});
    Py_RETURN_TRUE;
error:
    PyMem_Free(handle);
    Py_DECREF(name);
    Py_DECREF(encoded);
    return error == NO_SLOT ? Py_NewRef(Py_False) : NULL;
}

PyDoc_STRVAR(attach_doc,
"_attach($self, name, mode, read, write, block, /)\n--\n\n"
"Open a queue that exists, with a lease.");

static PyObject *
message_queue_attach(PyObject *op, PyObject *args)
{
    State *state = state_of(op);
    PyObject *name, *mode_arg, *read_arg, *write_arg, *block_arg;
    mode_t mode = 0;
    bool read = false, write = false, block = true;
    if (state == NULL ||
        !PyArg_ParseTuple(args, "OOOOO:_attach", &name, &mode_arg, &read_arg, &write_arg, &block_arg) ||
        args_mode(mode_arg, &mode) < 0 || args_bool(read_arg, "read", &read) < 0 ||
        args_bool(write_arg, "write", &write) < 0 || args_bool(block_arg, "block", &block) < 0) {
        return NULL;
    }
    int options = OPTION_TRACKED | (read ? OPTION_READ : 0) | (write ? OPTION_WRITE : 0) | (block ? 0 : OPTION_NONBLOCK);
    return attach(state, op, name, mode, options, NULL) < 0 ? NULL : Py_NewRef(Py_None);
}

/* Does the name still lead to the queue of this handle? A queue has one name and cannot be renamed: it does as long as
 * the queue has it. Asked through the handle's own descriptor where it is open, and not closed or a stranger's behind our
 * back, because closing any other one would cancel this process's notification. 0 or an errno; ENOENT: no. */
static int
check_still_named(MessageQueueObject *self, const char *name, const Identity *identity)
{
    FileFacts facts;
    int descriptor;
    Handle *handle = message_queue_pin((PyObject *)self, &descriptor);
    if (handle != NULL && !identity_leads_to(descriptor, identity)) {
        message_queue_unpin((PyObject *)self, handle);
        handle = NULL;
    }
    if (handle == NULL) {
        descriptor = mq_open(name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    }
    int error = descriptor < 0 || identity_facts(descriptor, &facts) < 0 ? errno : 0;
    if (handle != NULL) {
        message_queue_unpin((PyObject *)self, handle);
    }
    else if (descriptor >= 0) {
        mq_close(descriptor);
    }
    return error != 0 ? error : identity_same_object(&facts.identity, identity) && facts.links > 0 ? 0 : ENOENT;
}

static PyObject *
message_queue_unlink_tracked(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    Unlinking unlinking;
    if (tracked_begin_unlink(&self->head, KIND_MESSAGE_QUEUE, &unlinking) < 0) {
        return NULL;
    }
    const char *name = PyBytes_AS_STRING(unlinking.encoded);
    int error = check_still_named(self, name, &unlinking.identity);
    if (error == 0 && mq_unlink(name) < 0) {
        error = errno;
    }
    return tracked_end_unlink(&self->head, &unlinking, "mq_unlink", error);
}

#endif

/* ---- getters ---- */

static PyObject *
message_queue_get_mqd(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(read_descriptor((MessageQueueObject *)self));
}

/* What the kernel said when the queue was opened; readable after close() too. */
static PyObject *
get_size(PyObject *op, const char *what, const long *field)
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    bool opened;
    long value;
    Py_BEGIN_CRITICAL_SECTION(self);
    opened = self->head.name != NULL;
    value = *field;
    Py_END_CRITICAL_SECTION();
    return opened ? PyLong_FromLong(value) : named_raise(&self->head, EBADF, what, NULL);
}

static PyObject *
message_queue_get_max_messages(PyObject *self, void *Py_UNUSED(closure))
{
    return get_size(self, "max_messages", &((MessageQueueObject *)self)->max_messages);
}

static PyObject *
message_queue_get_max_message_size(PyObject *self, void *Py_UNUSED(closure))
{
    return get_size(self, "max_message_size", &((MessageQueueObject *)self)->max_message_size);
}

static PyObject *
message_queue_get_current_messages(PyObject *op, void *Py_UNUSED(closure))
{
    struct mq_attr attributes;
    int error = read_attributes((MessageQueueObject *)op, &attributes);
    return error != 0 ? named_raise((NamedObject *)op, error, "mq_getattr", NULL)
                      : PyLong_FromLong(attributes.mq_curmsgs);
}

static PyObject *
message_queue_get_block(PyObject *op, void *Py_UNUSED(closure))
{
    struct mq_attr attributes;
    int error = read_attributes((MessageQueueObject *)op, &attributes);
    return error != 0 ? named_raise((NamedObject *)op, error, "mq_getattr", NULL)
                      : PyBool_FromLong(!(attributes.mq_flags & O_NONBLOCK));
}

static int
message_queue_set_block(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    MessageQueueObject *self = (MessageQueueObject *)op;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "block cannot be deleted");
        return -1;
    }
    int block = PyObject_IsTrue(value);
    if (block < 0) {
        return -1;
    }
    int error;
    struct mq_attr attributes = {.mq_flags = block ? 0 : O_NONBLOCK};
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->handle == NULL) {
        error = EBADF;
    }
    else {
        error = mq_setattr(self->handle->descriptor, &attributes, NULL) < 0 ? errno : 0;
    }
    Py_END_CRITICAL_SECTION();
    if (error != 0) {
        named_raise(&self->head, error, "mq_setattr", NULL);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(message_queue_doc,
"MessageQueue(name, flags=0, mode=0o600, max_messages=10, max_message_size=8192, read=True, write=True)\n--\n\n"
"A handle on a named queue of messages between processes.\n\n"
"name: str or bytes, \"/\" and up to 255 bytes without another slash; None, with O_CREX, takes a random unused name.\n"
"flags: 0 opens what exists, O_CREAT creates what does not, O_CREX only creates; O_NONBLOCK starts with block False.\n"
"mode: the permissions of a new queue, less the umask.\n"
"max_messages, max_message_size: of a new queue, in messages and bytes. The system allows an unprivileged user 10 and\n"
"8192 unless fs.mqueue.msg_max and fs.mqueue.msgsize_max are raised, and RLIMIT_MSGQUEUE bytes in all.\n"
"read, write: what this handle is for; one of them at least.\n\n"
"`with queue:` does close() at the end. The queue outlives its handles and processes until it is unlinked. Handles may be used from several threads at once,\n"
"and pickled: that is by name.\n\n"
"Raises ExistentialError (no such queue, or with O_CREX: it exists), PermissionsError, ValueError (a name or size that\n"
"cannot be), TypeError, OSError (descriptors, queues or their memory exhausted).\n\n"
"POSIX.1-2008: mq_open().");

static PyMethodDef message_queue_methods[] = {
    {"send", (PyCFunction)(void (*)(void))message_queue_send, METH_FASTCALL | METH_KEYWORDS, send_doc},
    {"receive", (PyCFunction)(void (*)(void))message_queue_receive, METH_FASTCALL | METH_KEYWORDS, receive_doc},
    {"receive_into", (PyCFunction)(void (*)(void))message_queue_receive_into, METH_FASTCALL | METH_KEYWORDS,
     receive_into_doc},
    {"request_notification", (PyCFunction)(void (*)(void))message_queue_request_notification,
     METH_FASTCALL | METH_KEYWORDS, request_notification_doc},
    {"close", message_queue_close, METH_NOARGS, close_doc},
    {"unlink", message_queue_unlink, METH_NOARGS, unlink_doc},
    {"fileno", message_queue_fileno, METH_NOARGS, fileno_doc},
    {"__enter__", message_queue_enter, METH_NOARGS, enter_doc},
    {"__exit__", (PyCFunction)(void (*)(void))message_queue_exit, METH_FASTCALL, exit_doc},
    {"__reduce__", message_queue_reduce, METH_NOARGS, reduce_doc},
#if HAVE_TRACKING
    {"_create", message_queue_create, METH_VARARGS, create_doc},
    {"_attach", message_queue_attach, METH_VARARGS, attach_doc},
    {"_unlink", message_queue_unlink_tracked, METH_NOARGS, tracked_unlink_doc},
    TRACKED_METHODS
#endif
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef message_queue_getset[] = {
    {"name", named_get_name, NULL, PyDoc_STR("The name as given to the constructor; str."), NULL},
    {"mode", named_get_mode, NULL, PyDoc_STR("The permissions as given to the constructor; int."), NULL},
    {"mqd", message_queue_get_mqd, NULL,
     PyDoc_STR("The descriptor of the queue, close-on-exec; -1 after close()."), NULL},
    {"block", message_queue_get_block, message_queue_set_block,
     PyDoc_STR("Do send() and receive() wait? bool; shared by all descriptors that come from one open.\n"
               "\n"
               "Raises ExistentialError after close().\n"
               "\n"
               "POSIX.1-2008: mq_getattr(), mq_setattr(), O_NONBLOCK."),
     NULL},
    {"max_messages", message_queue_get_max_messages, NULL,
     PyDoc_STR("How many messages the queue can hold; int, also after close(). POSIX.1-2008: mq_getattr()."), NULL},
    {"max_message_size", message_queue_get_max_message_size, NULL,
     PyDoc_STR("The longest message in bytes; int, also after close(). POSIX.1-2008: mq_getattr()."), NULL},
    {"current_messages", message_queue_get_current_messages, NULL,
     PyDoc_STR("How many messages are in the queue at this instant; int. Raises ExistentialError after close().\n"
               "\n"
               "POSIX.1-2008: mq_getattr()."),
     NULL},
#if HAVE_TRACKING
    TRACKED_GETSET
#endif
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot message_queue_slots[] = {
    {Py_tp_doc, (void *)message_queue_doc},
    {Py_tp_new, message_queue_new},
    {Py_tp_init, message_queue_init},
    {Py_tp_dealloc, message_queue_dealloc},
    {Py_tp_repr, message_queue_repr},
    {Py_tp_str, named_str},
    {Py_tp_members, named_members},
    {Py_tp_methods, message_queue_methods},
    {Py_tp_getset, message_queue_getset},
    {0, NULL},
};

/* Not garbage-collected: see semaphore_spec. (What a callback refers to belongs to the kernel's notification.) */
PyType_Spec message_queue_spec = {
    .name = "posix_ipc.MessageQueue",
    .basicsize = sizeof(MessageQueueObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = message_queue_slots,
};

#endif
