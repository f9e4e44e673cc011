/* Deadlines. */
#include "ext.h"

#define SECOND 1000000000

/* clock_gettime cannot fail here: the clocks are constants that every supported system has. */
struct timespec
clock_after(clockid_t clock, int64_t nanoseconds)
{
    struct timespec time;
    (void)clock_gettime(clock, &time);
    time.tv_sec += (time_t)(nanoseconds / SECOND);
    time.tv_nsec += (long)(nanoseconds % SECOND);
    if (time.tv_nsec >= SECOND) {
        time.tv_sec++;
        time.tv_nsec -= SECOND;
    }
    return time;
}

/* Nanoseconds until the deadline; negative once it has passed. */
int64_t
clock_remaining(clockid_t clock, const struct timespec *deadline)
{
    struct timespec now;
    (void)clock_gettime(clock, &now);
    return (int64_t)(deadline->tv_sec - now.tv_sec) * SECOND + (deadline->tv_nsec - now.tv_nsec);
}
