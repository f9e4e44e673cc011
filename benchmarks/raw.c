/* The system calls that the operations come down to, in loops without anything around them. Each function returns the
 * nanoseconds that `count` rounds took, or a negative number when a call failed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <mqueue.h>
#include <semaphore.h>
#include <stdio.h>
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

/* What two processes make of the turn that they hand to each other: NAME-there wakes the other one, NAME-back this one. */
static int
open_semaphores(const char *name, sem_t **there, sem_t **back)
{
    char path[300];
    snprintf(path, sizeof(path), "%s-there", name);
    *there = sem_open(path, 0);
    snprintf(path, sizeof(path), "%s-back", name);
    *back = sem_open(path, 0);
    return *there == SEM_FAILED || *back == SEM_FAILED ? -1 : 0;
}

double
semaphore_ping(const char *name, long count)
{
    sem_t *there, *back;
    if (open_semaphores(name, &there, &back) < 0) {
        return -1;
    }
    double start = now();
    for (long i = 0; i < count; i++) {
        if (sem_post(there) < 0 || sem_wait(back) < 0) {
            return -1;
        }
    }
    double end = now();
    sem_close(there);
    sem_close(back);
    return end - start;
}

/* Returns only after a failure: who runs this is killed. */
double
semaphore_echo(const char *name)
{
    sem_t *there, *back;
    if (open_semaphores(name, &there, &back) < 0) {
        return -1;
    }
    while (sem_wait(there) == 0 && sem_post(back) == 0) {
    }
    return -1;
}

static int
open_queues(const char *name, mqd_t *there, mqd_t *back)
{
    char path[300];
    snprintf(path, sizeof(path), "%s-there", name);
    *there = mq_open(path, O_RDWR);
    snprintf(path, sizeof(path), "%s-back", name);
    *back = mq_open(path, O_RDWR);
    return *there == (mqd_t)-1 || *back == (mqd_t)-1 ? -1 : 0;
}

double
queue_ping(const char *name, long count)
{
    char message[8192] = {0};
    mqd_t there, back;
    if (open_queues(name, &there, &back) < 0) {
        return -1;
    }
    double start = now();
    for (long i = 0; i < count; i++) {
        if (mq_send(there, message, 16, 0) < 0 || mq_receive(back, message, sizeof(message), NULL) < 0) {
            return -1;
        }
    }
    double end = now();
    mq_close(there);
    mq_close(back);
    return end - start;
}

/* Returns only after a failure: who runs this is killed. */
double
queue_echo(const char *name)
{
    char message[8192];
    mqd_t there, back;
    if (open_queues(name, &there, &back) < 0) {
        return -1;
    }
    while (mq_receive(there, message, sizeof(message), NULL) >= 0 && mq_send(back, message, 16, 0) == 0) {
    }
    return -1;
}
