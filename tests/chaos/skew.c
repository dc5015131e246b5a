/* A host's clock that can be set: wall time is the kernel's plus what the file SKEW_FILE says (int64, ms).

   cc -shared -fPIC -o skew.so skew.c -ldl;  LD_PRELOAD=skew.so SKEW_FILE=... program

   Monotonic time is left alone, as a step of a real clock leaves it. Waits until a moment of wall time are translated
   back, because the kernel knows nothing of all this; moments before 2001 are monotonic ones. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *skew_ms;

__attribute__((constructor)) static void open_file(void) {
    const char *path = getenv("SKEW_FILE");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *skew_ms, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) skew_ms = page;
}

static void shift(struct timespec *t, int64_t ms) {
    int64_t ns = t->tv_nsec + ms % 1000 * 1000000;
    t->tv_sec += ms / 1000;
    if (ns < 0) { ns += 1000000000; t->tv_sec--; }
    if (ns >= 1000000000) { ns -= 1000000000; t->tv_sec++; }
    t->tv_nsec = ns;
}

int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = (int)syscall(SYS_clock_gettime, id, t);
    if (!failed && skew_ms != NULL && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) shift(t, *skew_ms);
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t != NULL) *t = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *t, int base) {
    return clock_gettime(CLOCK_REALTIME, t) ? 0 : base;
}

static struct timespec of_kernel(const struct timespec *until) {
    struct timespec t = *until;
    if (skew_ms != NULL && t.tv_sec > 1000000000) shift(&t, -*skew_ms);
    return t;
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (real == NULL) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec t = of_kernel(until);
    return real(c, m, &t);
}

/* glibc's own goes on to an inner function, not to the one above; librdkafka calls it. */
int cnd_timedwait(cnd_t *restrict c, mtx_t *restrict m, const struct timespec *restrict until) {
    static int (*real)(cnd_t *, mtx_t *, const struct timespec *);
    if (real == NULL) real = dlsym(RTLD_NEXT, "cnd_timedwait");
    struct timespec t = of_kernel(until);
    return real(c, m, &t);
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (real == NULL) real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec t = of_kernel(until);
    return real(s, &t);
}
