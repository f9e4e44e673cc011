/* Files of /dev/shm that get their name only when they are complete: whoever finds the name finds a finished object,
 * and a process that dies on the way leaves nothing, where the kernel can make files without a name.
 * See O_TMPFILE in open(2) and linkat(2). */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>

int
shm_file_allocate(int descriptor, off_t size)
{
#if HAVE_ALLOCATE
    sigset_t all, before;
    sigfillset(&all); /* a signal would undo what is allocated so far, and a periodic one would do so for ever */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = posix_fallocate(descriptor, 0, size);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
#else
    (void)descriptor;
    (void)size;
    return ENOSYS;
#endif
}

#if MAP_SEMAPHORE_FILES

#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

/* The umask, without the race of setting it to read it; -1 where /proc does not tell. */
static int
read_umask(void)
{
    char text[512];
    int descriptor = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        return -1;
    }
    ssize_t length = read(descriptor, text, sizeof(text) - 1);
    close(descriptor);
    if (length <= 0) {
        return -1;
    }
    text[length] = '\0';
    const char *line = strstr(text, "\nUmask:");
    return line != NULL ? (int)strtol(line + strlen("\nUmask:"), NULL, 8) : -1;
}

/* Linux before 6.0 forgets the umask for files without a name where the file system has access control lists. 0, or -1
 * where it cannot be known or applied. */
static int
apply_umask(int descriptor, mode_t mode)
{
    struct stat status;
    if ((mode & 077) == 0) {
        return 0; /* nothing was asked for that a sensible umask withholds */
    }
    if (fstat(descriptor, &status) < 0) {
        return -1;
    }
    if ((status.st_mode & 07777) != (mode & 07777)) {
        return 0; /* it was applied */
    }
    int mask = read_umask();
    if (mask < 0) {
        return -1;
    }
    return (mode & (mode_t)mask) != 0 ? fchmod(descriptor, mode & ~(mode_t)mask) : 0;
}

/* Linux 6.10 and later give a file of one's own its first name by its descriptor alone; before, /proc is needed. */
static bool
can_publish(void)
{
    struct utsname kernel;
    unsigned major, minor;
    if (uname(&kernel) == 0 && sscanf(kernel.release, "%u.%u", &major, &minor) == 2 &&
        (major > 6 || (major == 6 && minor >= 10))) {
        return true;
    }
    return access("/proc/self/fd", X_OK) == 0;
}

/* Locks what was just made, so that a sweep can tell that its maker lives. 0 or an errno; EEXIST: a sweep was quicker. */
static int
lock_temporary(int descriptor)
{
    struct stat status;
    if (flock(descriptor, LOCK_SH | LOCK_NB) < 0) {
        return errno == EWOULDBLOCK ? EEXIST : errno;
    }
    if (fstat(descriptor, &status) < 0) {
        return errno;
    }
    return status.st_nlink > 0 ? 0 : EEXIST;
}

static int
begin_named(ShmFile *file, mode_t mode)
{
    for (int attempt = 0; attempt < 100; attempt++) {
        unsigned char bits[8];
        if (getentropy(bits, sizeof(bits)) < 0) {
            return -1;
        }
        int length = snprintf(file->temporary, sizeof(file->temporary), SHM_DIRECTORY ".posix_ipc.tmp-");
        for (size_t i = 0; i < sizeof(bits); i++) {
            length += snprintf(file->temporary + length, sizeof(file->temporary) - (size_t)length, "%02x", bits[i]);
        }
        file->descriptor = open(file->temporary, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
        int error = file->descriptor >= 0 ? lock_temporary(file->descriptor) : errno;
        if (error == 0) {
            return 0;
        }
        if (file->descriptor >= 0) {
            unlink(file->temporary);
            close(file->descriptor);
        }
        errno = error;
        if (error != EEXIST) {
            break;
        }
    }
    file->temporary[0] = '\0';
    return -1;
}

int
shm_file_begin(ShmFile *file, mode_t mode)
{
    file->temporary[0] = '\0';
    file->descriptor = open(SHM_DIRECTORY, O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
    if (file->descriptor < 0) {
        /* What a file system or a kernel that cannot do it answers. */
        return errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL ? begin_named(file, mode) : -1;
    }
    /* What could not get its name, or its mode, is made with a name at once. */
    if (!can_publish() || apply_umask(file->descriptor, mode) < 0) {
        close(file->descriptor);
        return begin_named(file, mode);
    }
    return 0;
}

static void
remove_temporary(ShmFile *file)
{
    if (file->temporary[0] != '\0') {
        unlink(file->temporary);
        file->temporary[0] = '\0';
    }
}

int
shm_file_publish(ShmFile *file, const char *path, bool leased)
{
    char source[64];
    if (file->temporary[0] != '\0') {
        if (linkat(AT_FDCWD, file->temporary, AT_FDCWD, path, 0) < 0) {
            return -1;
        }
        remove_temporary(file);
        if (!leased) { /* else a mapping would keep the lock, as if it were a lease */
            (void)flock(file->descriptor, LOCK_UN);
        }
        return 0;
    }
    if (linkat(file->descriptor, "", AT_FDCWD, path, AT_EMPTY_PATH) == 0) {
        return 0;
    }
    if (errno != ENOENT) { /* what a kernel before 6.10 says of it */
        return -1;
    }
    snprintf(source, sizeof(source), "/proc/self/fd/%d", file->descriptor);
    return linkat(AT_FDCWD, source, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

void
shm_file_end(ShmFile *file)
{
    int error = errno;
    remove_temporary(file);
    close(file->descriptor);
    errno = error;
}

#endif
