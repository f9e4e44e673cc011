/* Leases: what keeps a tracked object alive, and what its record says.
 *
 * A lease is a shared flock on the object's file, made through the open file that the handle uses itself: the descriptor
 * of a segment or a queue, the mapping of a semaphore. So it costs nothing else, a fork inherits it, a mapping of the
 * memory keeps it when the descriptor is closed, and it goes with the last process that has any of these, however that
 * dies. Whoever wants to remove the object asks for an exclusive flock, and gets none. A lease is never unlocked, only
 * dropped: unlocking would take it from the other processes that inherited it. See flock(2). */
#include "ext.h"

#if HAVE_TRACKING

#include <errno.h>
#include <string.h>
#include <sys/file.h>

/* In ms. A sweep holds the locks of what it may remove while it reads the journals of the living anew: microseconds as a
 * rule, a tenth of a second where many live. Whoever holds one for longer is no sweep of ours, or was stopped. */
#define PATIENCE 1000
#define LONGEST_PAUSE 16

int
lease_lock(int descriptor)
{
    for (long waited = 0, pause = 1;; waited += pause, pause = pause < LONGEST_PAUSE ? 2 * pause : pause) {
        if (flock(descriptor, LOCK_SH | LOCK_NB) == 0) {
            return 0;
        }
        if (errno != EWOULDBLOCK && errno != EINTR) {
            return errno;
        }
        if (waited >= PATIENCE) {
            return EBUSY;
        }
        const struct timespec time = {0, pause * 1000000};
        (void)nanosleep(&time, NULL); /* shorter after a signal, which does no harm */
    }
}

const char *
record_name(const char *name)
{
    while (name[0] == '/' && name[1] == '/') {
        name++;
    }
    return name;
}

int
record_add(Record *record, SlotState state, Kind kind, const char *name, const Identity *identity)
{
    name = record_name(name);
    if (strlen(name) > NAME_MAX + 1) {
        return ENAMETOOLONG;
    }
    if (record->journal == NULL || !journal_hold(record->journal)) {
        return NO_SLOT;
    }
    record->identity = *identity;
    record->index = journal_add(record->journal, state, kind, name, identity, state == SLOT_CLAIM);
    if (record->index < 0) { /* full, or closed since: the caller looks for another one */
        journal_release(record->journal);
        return NO_SLOT;
    }
    return 0;
}

void
record_settle(Record *record)
{
    journal_release(record->journal);
}

void
record_confirm(Record *record, const Identity *identity)
{
    journal_confirm(record->journal, record->index, identity);
    record->identity = *identity;
}

SlotState
record_state(const Record *record)
{
    return record->journal != NULL ? journal_state(record->journal, record->index, &record->identity) : SLOT_FREE;
}

void
record_remove(Record *record)
{
    if (record->journal != NULL && record->index >= 0) {
        journal_remove(record->journal, record->index, &record->identity);
        record->index = -1;
    }
}

#endif
