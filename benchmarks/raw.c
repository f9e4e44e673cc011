/* The system calls that the operations come down to, in loops without anything around them. Each function returns the
 * nanoseconds that `count` rounds took, or a negative number when a call failed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <mqueue.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static double
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

double
semaphore_pair(const char *name, long count)
{
    sem_t *semaphore = sem_open(name, 0);
    if (semaphore == SEM_FAILED) {
        return -1;
    }
    double start = now();
    for (long i = 0; i < count; i++) {
        if (sem_wait(semaphore) < 0 || sem_post(semaphore) < 0) {
            return -1;
        }
    }
    double end = now();
    sem_close(semaphore);
    return end - start;
}

double
segment_life(const char *name, long count)
{
    double start = now();
    for (long i = 0; i < count; i++) {
        int descriptor = shm_open(name, O_CREAT | O_EXCL | O_RDWR, 0600);
        if (descriptor < 0 || ftruncate(descriptor, 4096) < 0 || close(descriptor) < 0 || shm_unlink(name) < 0) {
            return -1;
        }
    }
    return now() - start;
}

double
queue_pair(const char *name, long size, long count)
{
    char *message = calloc(1, 8192);
    unsigned priority;
    mqd_t queue = mq_open(name, O_RDWR);
    if (queue == (mqd_t)-1 || message == NULL) {
        return -1;
    }
    double start = now();
    for (long i = 0; i < count; i++) {
        if (mq_send(queue, message, (size_t)size, 0) < 0 || mq_receive(queue, message, 8192, &priority) < 0) {
            return -1;
        }
    }
    double end = now();
    mq_close(queue);
    free(message);
    return end - start;
}
