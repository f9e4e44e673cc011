/* Which limit of the system did a call run into, what is its value, and where is it set? Asked on failure only. */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* "819200 bytes" or "unlimited". */
static void
describe_resource(char *text, size_t size, int resource, const char *unit)
{
    struct rlimit limit;
    if (getrlimit(resource, &limit) < 0) {
        snprintf(text, size, "unknown");
    }
    else if (limit.rlim_cur == RLIM_INFINITY) {
        snprintf(text, size, "unlimited");
    }
    else {
        snprintf(text, size, "%llu%s", (unsigned long long)limit.rlim_cur, unit);
    }
}

typedef struct {
    char text[32];
} Sysctl;

/* The number in a file of /proc/sys, in words. */
static Sysctl
read_sysctl(const char *path)
{
    Sysctl value = {"unknown"};
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) {
        char text[sizeof(value.text)];
        ssize_t length = read(descriptor, text, sizeof(text) - 1);
        close(descriptor);
        if (length > 0) {
            text[length] = '\0';
            snprintf(value.text, sizeof(value.text), "%.*s", (int)strcspn(text, "\n"), text);
        }
    }
    return value;
}

/* Is there no descriptor left in this process? */
static bool
descriptors_exhausted(void)
{
    int descriptor = open("/", O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) {
        close(descriptor);
        return false;
    }
    return errno == EMFILE;
}

void
limit_describe(char *text, size_t size, const char *call, int error)
{
    bool queue = strncmp(call, "mq_", 3) == 0;
    char value[64];
    text[0] = '\0';
    switch (error) {
    case EMFILE:
#if HAVE_MESSAGE_QUEUES
        if (queue && !descriptors_exhausted()) {
            describe_resource(value, sizeof(value), RLIMIT_MSGQUEUE, " bytes");
            snprintf(text, size, " (RLIMIT_MSGQUEUE is %s for all queues of this user;"
                     " unlink some, or raise it with 'ulimit -q' or limits.conf)", value);
            return;
        }
#endif
        describe_resource(value, sizeof(value), RLIMIT_NOFILE, " descriptors");
        snprintf(text, size, " (RLIMIT_NOFILE is %s for this process;"
                 " close some, or raise it with 'ulimit -n' or limits.conf)", value);
        return;
    case ENFILE:
        snprintf(text, size, " (fs.file-max is %s descriptors for the whole system, set with sysctl)",
                 read_sysctl("/proc/sys/fs/file-max").text);
        return;
    case ENOSPC:
        if (queue) {
            snprintf(text, size, " (fs.mqueue.queues_max is %s queues, set with sysctl)",
                     read_sysctl("/proc/sys/fs/mqueue/queues_max").text);
        }
        else {
            struct statvfs facts;
            if (statvfs(SHM_DIRECTORY, &facts) == 0) {
                snprintf(text, size, " (%s has %llu bytes and %llu inodes free;"
                         " its size is set where it is mounted)", SHM_DIRECTORY,
                         (unsigned long long)facts.f_bavail * facts.f_frsize, (unsigned long long)facts.f_favail);
            }
        }
        return;
    case EFBIG:
        describe_resource(value, sizeof(value), RLIMIT_FSIZE, " bytes");
        snprintf(text, size, " (RLIMIT_FSIZE is %s for this process, set with 'ulimit -f')", value);
        return;
    case ENOMEM:
        describe_resource(value, sizeof(value), RLIMIT_AS, " bytes");
        snprintf(text, size, " (RLIMIT_AS is %s for this process, set with 'ulimit -v';"
                 " vm.max_map_count is %s mappings, set with sysctl)", value,
                 read_sysctl("/proc/sys/vm/max_map_count").text);
        return;
    case ENAMETOOLONG:
        snprintf(text, size, " (at most %zu bytes)",
                 NAME_MAX - (strncmp(call, "sem_", 4) == 0 ? strlen(SEMAPHORE_FILE_PREFIX) : 0));
        return;
    case EAGAIN:
        if (strcmp(call, "pthread_create") == 0) {
            describe_resource(value, sizeof(value), RLIMIT_NPROC, " processes and threads");
            snprintf(text, size, " (RLIMIT_NPROC is %s of this user, set with 'ulimit -u' or limits.conf)", value);
        }
        return;
    case EOVERFLOW:
        if (strncmp(call, "sem_", 4) != 0) {
            return;
        }
        snprintf(text, size, " (SEMAPHORE_VALUE_MAX is %ld)", (long)SEMAPHORE_VALUE_LIMIT);
        return;
    default:
        return;
    }
}

void
limit_describe_queue(char *text, size_t size, long max_messages, long max_message_size)
{
    snprintf(text, size, "Invalid argument (max_messages is %ld, fs.mqueue.msg_max allows %s;"
             " max_message_size is %ld bytes, fs.mqueue.msgsize_max allows %s; both are set with sysctl)",
             max_messages, read_sysctl("/proc/sys/fs/mqueue/msg_max").text, max_message_size,
             read_sysctl("/proc/sys/fs/mqueue/msgsize_max").text);
}
