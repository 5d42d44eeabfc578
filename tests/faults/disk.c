/* Preloaded into a process: at the n-th call that changes files below a folder, the process is killed in place of the
   call, or the disk is full from then on, or can only be read. Nothing happens until disk_fault_arm was called.

   Calls are counted over all threads. A full disk refuses to create, write, grow, rename and synchronise, with ENOSPC;
   it lets go of files as ever, and removals are not counted.

   The clock of the day goes back when clock_fault_arm is called. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static enum { FULL, KILL, READ_ONLY } kind;
static long fault_at; /* 0: never */
static atomic_long calls;

void disk_fault_arm(const char *path, int of_kind, long at) {
    strncpy(folder, path, sizeof folder - 1);
    kind = of_kind;
    fault_at = at;
    atomic_store(&calls, 0);
}

long disk_fault_calls(void) { return atomic_load(&calls); }

static int is_below(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int path_is_below(int directory, const char *path) {
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return is_below(path);
    char link[64], base[PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
        return is_below(base);
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t size = readlink(link, base, sizeof base - 1);
    if (size < 0) return 0;
    base[size] = 0;
    return is_below(base);
}

static int file_is_below(int file) {
    if (!folder[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return is_below(path);
}

/* Whether the call is refused; it does not return where the process is to die here. */
static int refused(int removes) {
    if (removes && kind == FULL) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (!fault_at || number < fault_at) return 0;
    if (kind == KILL) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = kind == FULL ? ENOSPC : EROFS;
    return 1;
}

static int is_change(int flags) {
    return (flags & (O_CREAT | O_TRUNC)) || (kind == READ_ONLY && (flags & O_ACCMODE) != O_RDONLY);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define ON_FILE(type, name, arguments, given, ...) \
    type name arguments { \
        REAL(type, #name, __VA_ARGS__); \
        return file_is_below(file) && refused(0) ? (type)-1 : real given; \
    }

ON_FILE(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), int, const void *, size_t)
ON_FILE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at),
        int, const void *, size_t, off_t)
ON_FILE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at),
        int, const void *, size_t, off64_t)
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count),
        int, const struct iovec *, int)
ON_FILE(ssize_t, pwritev, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at),
        int, const struct iovec *, int, off_t)
ON_FILE(ssize_t, pwritev64, (int file, const struct iovec *parts, int count, off64_t at), (file, parts, count, at),
        int, const struct iovec *, int, off64_t)
ON_FILE(ssize_t, sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size),
        int, int, off_t *, size_t)
ON_FILE(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t size), (file, from, at, size),
        int, int, off64_t *, size_t)
ON_FILE(int, ftruncate, (int file, off_t size), (file, size), int, off_t)
ON_FILE(int, ftruncate64, (int file, off64_t size), (file, size), int, off64_t)
ON_FILE(int, fsync, (int file), (file), int)
ON_FILE(int, fdatasync, (int file), (file), int)

ssize_t copy_file_range(int from, off64_t *read_at, int file, off64_t *at, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    return file_is_below(file) && refused(0) ? -1 : real(from, read_at, file, at, size, flags);
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        REAL(int, #name, const char *, int, ...); \
        int changes = is_change(flags) && path_is_below(AT_FDCWD, path); \
        return changes && refused(0) ? -1 : real(path, flags, mode); \
    }
#define OPENS_AT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        REAL(int, #name, int, const char *, int, ...); \
        int changes = is_change(flags) && path_is_below(directory, path); \
        return changes && refused(0) ? -1 : real(directory, path, flags, mode); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define ON_PATH(name, removes, arguments, place, path, given, ...) \
    int name arguments { \
        REAL(int, #name, __VA_ARGS__); \
        return path_is_below(place, path) && refused(removes) ? -1 : real given; \
    }

ON_PATH(mkdir, 0, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode), const char *, mode_t)
ON_PATH(mkdirat, 0, (int at, const char *path, mode_t mode), at, path, (at, path, mode), int, const char *, mode_t)
ON_PATH(rename, 0, (const char *from, const char *to), AT_FDCWD, to, (from, to), const char *, const char *)
ON_PATH(renameat, 0, (int a, const char *from, int b, const char *to), b, to, (a, from, b, to),
        int, const char *, int, const char *)
ON_PATH(renameat2, 0, (int a, const char *from, int b, const char *to, unsigned flags), b, to, (a, from, b, to, flags),
        int, const char *, int, const char *, unsigned)
ON_PATH(link, 0, (const char *from, const char *to), AT_FDCWD, to, (from, to), const char *, const char *)
ON_PATH(symlink, 0, (const char *from, const char *to), AT_FDCWD, to, (from, to), const char *, const char *)
ON_PATH(unlink, 1, (const char *path), AT_FDCWD, path, (path), const char *)
ON_PATH(unlinkat, 1, (int at, const char *path, int flags), at, path, (at, path, flags), int, const char *, int)
ON_PATH(rmdir, 1, (const char *path), AT_FDCWD, path, (path), const char *)

static atomic_long seconds_back;

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= atomic_load(&seconds_back);
    return result;
}

void clock_fault_arm(long seconds) { atomic_store(&seconds_back, seconds); }
