/* Let every flush of a program take longer, as on a slower disk: it sleeps for
 * OMNIQ_BENCHMARK_FLUSH_US microseconds, and then flushes. For LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

static int flush(const char *name, int descriptor)
{
    const char *given = getenv("OMNIQ_BENCHMARK_FLUSH_US");
    long microseconds = given ? atol(given) : 0;
    struct timespec length = {microseconds / 1000000, microseconds % 1000000 * 1000};
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);

    prctl(PR_SET_TIMERSLACK, 1); /* else it sleeps 50 microseconds longer */
    nanosleep(&length, NULL);
    return real(descriptor);
}

int fsync(int descriptor)
{
    return flush("fsync", descriptor);
}

int fdatasync(int descriptor)
{
    return flush("fdatasync", descriptor);
}
