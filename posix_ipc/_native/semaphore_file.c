/* A named semaphore in memory.
 *
 * On Linux a semaphore is a sem_t in a file of /dev/shm that everybody maps. Opening that file here, in place of
 * calling sem_open, tells its identity and its size before it is touched (a truncated file would be a SIGBUS), and
 * creating it by way of shm_file.c leaves no temporary file when the process is killed. C programs see no difference: sem_init with
 * pshared set makes the same bytes as sem_open, in the same place. */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if MAP_SEMAPHORE_FILES

#if defined(__GLIBC__)
#define FILE_PREFIX "sem."
#else
#define FILE_PREFIX "" /* musl */
#endif

/* 0, or the errno of sem_open(3) for such a name. */
static int
file_path(char path[SHM_PATH_SIZE], const char *name)
{
    while (*name == '/') { /* like the C library: "/a", "a" and "//a" are one semaphore */
        name++;
    }
    if (*name == '\0' || strchr(name, '/') != NULL) {
        return EINVAL;
    }
    if (strlen(name) + strlen(FILE_PREFIX) > NAME_MAX) {
        return ENAMETOOLONG;
    }
    snprintf(path, SHM_PATH_SIZE, SHM_DIRECTORY FILE_PREFIX "%s", name);
    return 0;
}

static int
map_file(int descriptor, OpenedSemaphore *opened)
{
    opened->failed = "mmap";
    void *address = mmap(NULL, sizeof(sem_t), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (address == MAP_FAILED) {
        return errno;
    }
    opened->semaphore = address;
    return 0;
}

int
semaphore_file_open(const char *name, OpenedSemaphore *opened)
{
    char path[SHM_PATH_SIZE];
    FileFacts facts;
    opened->failed = "sem_open";
    int error = file_path(path, name);
    if (error != 0) {
        return error;
    }
    int descriptor = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return errno == EISDIR || errno == ENXIO ? EILSEQ : errno; /* ENXIO: a socket */
    }
    if (identity_facts(descriptor, &facts) < 0) {
        error = errno;
    }
    else if (!S_ISREG(facts.mode) || facts.size < (int64_t)sizeof(sem_t)) {
        error = EILSEQ;
    }
    else {
        error = map_file(descriptor, opened);
    }
    close(descriptor);
    if (error == 0) {
        opened->identity = facts.identity;
    }
    return error;
}

int
semaphore_file_create(const char *name, mode_t mode, unsigned value, OpenedSemaphore *opened)
{
    char path[SHM_PATH_SIZE];
    ShmFile file;
    FileFacts facts;
    sem_t initial;
    opened->failed = "sem_open";
    int error = file_path(path, name);
    if (error != 0) {
        return error;
    }
    memset(&initial, 0, sizeof(initial));
    if (sem_init(&initial, 1, value) < 0 || shm_file_begin(&file, mode) < 0) {
        return errno;
    }
    ssize_t written = write(file.descriptor, &initial, sizeof(initial)); /* a full file system says so, not by SIGBUS */
    if (written != (ssize_t)sizeof(initial)) {
        error = written < 0 ? errno : ENOSPC;
    }
    else if (identity_facts(file.descriptor, &facts) < 0) {
        error = errno;
    }
    else {
        error = map_file(file.descriptor, opened);
    }
    if (error == 0 && shm_file_publish(&file, path) < 0) {
        opened->failed = "sem_open";
        error = errno;
        munmap(opened->semaphore, sizeof(sem_t));
    }
    shm_file_end(&file);
    if (error == 0) {
        opened->identity = facts.identity;
    }
    return error;
}

void
semaphore_file_close(sem_t *semaphore)
{
    munmap(semaphore, sizeof(sem_t));
}

#else /* the C library's own; it does not tell the identity */

static int
take(sem_t *semaphore, OpenedSemaphore *opened)
{
    memset(opened, 0, sizeof(*opened));
    opened->failed = "sem_open";
    if (semaphore == SEM_FAILED) {
        return errno;
    }
    opened->semaphore = semaphore;
    return 0;
}

int
semaphore_file_open(const char *name, OpenedSemaphore *opened)
{
    return take(sem_open(name, 0), opened);
}

int
semaphore_file_create(const char *name, mode_t mode, unsigned value, OpenedSemaphore *opened)
{
    return take(sem_open(name, O_CREAT | O_EXCL, mode, value), opened);
}

void
semaphore_file_close(sem_t *semaphore)
{
    sem_close(semaphore);
}

#endif
