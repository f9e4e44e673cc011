/* Which kernel object, of all that ever had this name? (boot id, device, inode, time of birth), and for queues the IPC
 * namespace: see statx(2), namespaces(7) and random(4). */
#include "ext.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/sysmacros.h>
#endif
#include <unistd.h>

static int
hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The kernel prints it as a UUID: 32 hexadecimal digits with dashes between. */
void
identity_read_boot_id(uint8_t boot_id[16])
{
    char text[64];
    memset(boot_id, 0, 16);
    int descriptor = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        return;
    }
    ssize_t length = read(descriptor, text, sizeof(text));
    close(descriptor);
    int digits = 0;
    for (ssize_t i = 0; i < length && digits < 32; i++) {
        int value = hex_digit(text[i]);
        if (value >= 0) {
            boot_id[digits / 2] = (uint8_t)(boot_id[digits / 2] << 4 | value);
            digits++;
        }
    }
}

static int
facts_by_stat(int descriptor, const char *path, int flags, FileFacts *facts)
{
    struct stat status;
    if ((path[0] == '\0' ? fstat(descriptor, &status) : fstatat(descriptor, path, &status, flags)) < 0) {
        return -1;
    }
    memset(facts, 0, sizeof(*facts));
    facts->identity.device = (uint64_t)status.st_dev;
    facts->identity.inode = (uint64_t)status.st_ino;
    facts->mode = status.st_mode;
    facts->uid = status.st_uid;
    facts->links = (uint64_t)status.st_nlink;
    facts->size = (int64_t)status.st_size;
    return 0;
}

/* Of the path, or if that is empty, of the descriptor. */
static int
read_facts(int descriptor, const char *path, int flags, FileFacts *facts)
{
#if defined(STATX_BTIME)
    struct statx status;
    if (statx(descriptor, path, flags, STATX_BASIC_STATS | STATX_BTIME, &status) == 0) {
        memset(facts, 0, sizeof(*facts));
        facts->identity.device = (uint64_t)makedev(status.stx_dev_major, status.stx_dev_minor);
        facts->identity.inode = status.stx_ino;
        if (status.stx_mask & STATX_BTIME) {
            facts->identity.born = (uint64_t)status.stx_btime.tv_sec * 1000000000u + status.stx_btime.tv_nsec;
        }
        facts->mode = status.stx_mode;
        facts->uid = status.stx_uid;
        facts->links = status.stx_nlink;
        facts->size = (int64_t)status.stx_size;
        return 0;
    }
    if (errno != ENOSYS && errno != EPERM) { /* old kernels; seccomp filters that have not heard of it */
        return -1;
    }
#endif
    return facts_by_stat(descriptor, path, flags, facts);
}

#if defined(AT_EMPTY_PATH)
#define OF_DESCRIPTOR AT_EMPTY_PATH
#else
#define OF_DESCRIPTOR 0
#endif

int
identity_facts(int descriptor, FileFacts *facts)
{
    return read_facts(descriptor, "", OF_DESCRIPTOR, facts);
}

int
identity_facts_at(const char *path, FileFacts *facts)
{
    return read_facts(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, facts);
}

int
identity_of_segment(const char *name, FileFacts *facts)
{
#if defined(__linux__)
    char path[SHM_PATH_SIZE];
    snprintf(path, sizeof(path), SHM_DIRECTORY "%s", name + strspn(name, "/"));
    return read_facts(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, facts); /* needs no descriptor, of which there may be none */
#else
    int descriptor = shm_open(name, O_RDONLY, 0);
    if (descriptor < 0) {
        return -1;
    }
    int result = identity_facts(descriptor, facts);
    int error = errno;
    close(descriptor);
    errno = error;
    return result;
#endif
}

uint64_t
identity_ipc_namespace(void)
{
    struct stat status;
    return stat("/proc/self/ns/ipc", &status) == 0 ? (uint64_t)status.st_ino : 0;
}

bool
identity_same_object(const Identity *a, const Identity *b)
{
    return a->device == b->device && a->inode == b->inode && (a->born == b->born || a->born == 0 || b->born == 0);
}

bool
identity_leads_to(int descriptor, const Identity *identity)
{
    FileFacts facts;
    return identity_facts(descriptor, &facts) == 0 && identity_same_object(&facts.identity, identity);
}

/* ---- in pickles ---- */

PyObject *
identity_pack(const State *state, const Identity *identity, Kind kind)
{
    Identity packed = *identity;
    memcpy(packed.boot_id, state->boot_id, sizeof(packed.boot_id));
    packed.namespace = kind == KIND_MESSAGE_QUEUE ? identity_ipc_namespace() : 0;
    return PyBytes_FromStringAndSize((const char *)&packed, sizeof(packed));
}

int
identity_unpack(PyObject *packed, Identity *identity)
{
    if (!PyBytes_Check(packed) || PyBytes_GET_SIZE(packed) != (Py_ssize_t)sizeof(*identity)) {
        PyErr_Format(PyExc_ValueError, "this pickle holds no identity of an object: %.200R", packed);
        return -1;
    }
    memcpy(identity, PyBytes_AS_STRING(packed), sizeof(*identity));
    return 0;
}

static bool
is_known(const uint8_t boot_id[16])
{
    static const uint8_t unknown[16];
    return memcmp(boot_id, unknown, sizeof(unknown)) != 0;
}

int
identity_check_host(State *state, const Identity *wanted, PyObject *name)
{
    if (is_known(wanted->boot_id) && is_known(state->boot_id) &&
        memcmp(wanted->boot_id, state->boot_id, sizeof(state->boot_id)) != 0) {
        raise_error(state->ExistentialError, ESTALE, name,
                    "%R was made on another host, or on this one before it was restarted", name);
        return -1;
    }
    return 0;
}

/* Did the object live in another namespace than the one that names are looked up in here? No, if no identity is known. */
static bool
is_elsewhere(const Identity *wanted, const Identity *found, Kind kind)
{
    if (found != NULL) {
        return found->device != wanted->device; /* each /dev/shm and each IPC namespace is a device of its own */
    }
    if (kind == KIND_MESSAGE_QUEUE) {
        uint64_t here = identity_ipc_namespace();
        return here != 0 && wanted->namespace != 0 && here != wanted->namespace;
    }
    struct stat status;
    return wanted->device != 0 && stat(SHM_DIRECTORY, &status) == 0 && (uint64_t)status.st_dev != wanted->device;
}

void
identity_raise_mismatch(State *state, const Identity *wanted, const Identity *found, Kind kind, PyObject *name)
{
    if (is_elsewhere(wanted, found, kind)) {
        raise_error(state->ExistentialError, ESTALE, name, "%R was made in another %s namespace", name,
                    kind == KIND_MESSAGE_QUEUE ? "IPC" : "mount");
    }
    else if (found != NULL) {
        raise_error(state->ExistentialError, ESTALE, name,
                    "%R belongs to another object now: the one that was pickled was unlinked", name);
    }
    else {
        raise_error(state->ExistentialError, ENOENT, name, "%R is gone: it was unlinked after it was pickled", name);
    }
}
