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

/* 0, or the errno of sem_open(3) for such a name. */
int
semaphore_file_path(const char *name, char path[SHM_PATH_SIZE])
{
    while (*name == '/') { /* like the C library: "/a", "a" and "//a" are one semaphore */
        name++;
    }
    if (*name == '\0' || strchr(name, '/') != NULL) {
        return EINVAL;
    }
    if (strlen(name) + strlen(SEMAPHORE_FILE_PREFIX) > NAME_MAX) {
        return ENAMETOOLONG;
    }
    snprintf(path, SHM_PATH_SIZE, SHM_DIRECTORY SEMAPHORE_FILE_PREFIX "%s", name);
    return 0;
}

#define REMOVED ESTALE /* it lost its name between open and the lease: whoever removed it had the lock first */

/* Takes a shared flock, which the mapping to come will keep. 0 or an errno. */
static int
lease(int descriptor, OpenedSemaphore *opened)
{
    FileFacts facts;
    opened->failed = "flock";
    int error = lease_lock(descriptor);
    if (error == 0 && identity_facts(descriptor, &facts) < 0) {
        error = errno;
    }
    return error != 0 ? error : facts.links == 0 ? REMOVED : 0;
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

static int
open_file(const char *path, OpenedSemaphore *opened, bool leased)
{
    FileFacts facts;
    int error;
    opened->failed = "sem_open";
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
        error = leased ? lease(descriptor, opened) : 0;
        if (error == 0) {
            error = map_file(descriptor, opened);
        }
    }
    close(descriptor);
    if (error == 0) {
        opened->identity = facts.identity;
    }
    return error;
}

int
semaphore_file_open(const char *name, OpenedSemaphore *opened, bool leased)
{
    char path[SHM_PATH_SIZE];
    opened->failed = "sem_open";
    int error = semaphore_file_path(name, path);
    if (error != 0) {
        return error;
    }
    do {
        error = open_file(path, opened, leased);
    } while (error == REMOVED);
    return error;
}

int
semaphore_file_create(const char *name, mode_t mode, unsigned value, OpenedSemaphore *opened, Record *record)
{
    char path[SHM_PATH_SIZE];
    ShmFile file;
    FileFacts facts;
    sem_t initial;
    opened->failed = "sem_open";
    int error = semaphore_file_path(name, path);
    if (error != 0) {
        return error;
    }
    if (record != NULL && record->journal == NULL) {
        return NO_SLOT;
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
    else if (record != NULL && !(facts.mode & S_IRUSR)) { /* by the umask: nobody could clean it up */
        opened->failed = "umask";
        error = EACCES;
    }
    else {
        error = record != NULL ? lease_lock(file.descriptor) : 0;
        if (error == 0) {
            error = map_file(file.descriptor, opened);
        }
    }
    bool mapped = error == 0;
    if (error == 0 && record != NULL) {
        error = record_add(record, SLOT_OWNED, KIND_SEMAPHORE, name, &facts.identity);
    }
    if (error == 0) {
        if (shm_file_publish(&file, path, record != NULL) < 0) {
            opened->failed = "sem_open";
            error = errno;
        }
        if (record != NULL) {
            if (error != 0) {
                record_remove(record);
            }
            record_settle(record);
        }
    }
    if (error != 0 && mapped) {
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
semaphore_file_open(const char *name, OpenedSemaphore *opened, bool Py_UNUSED(leased))
{
    return take(sem_open(name, 0), opened);
}

int
semaphore_file_create(const char *name, mode_t mode, unsigned value, OpenedSemaphore *opened,
                      Record *Py_UNUSED(record))
{
    return take(sem_open(name, O_CREAT | O_EXCL, mode, value), opened);
}

void
semaphore_file_close(sem_t *semaphore)
{
    sem_close(semaphore);
}

#endif
