/* Library for LD_PRELOAD that counts file-system events below one directory, and kills or fails the program at the n-th event.

Why a preloaded library: an audit hook of Python sees neither writes nor what C++ and Rust extensions do, and strace counts per
thread and cannot filter by directory. Here the count is one for all processes of a command, forked and spawned ones included.

`fault_arm` starts the counting in the calling process; its children go on with it. Every event appends a line "number kind path"
to the log. At event `at` the program is killed with its process group, in the middle of a write; or the call fails with `error`:
that one alone (`lasting` 0), or also those of the same kinds that follow. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct state {
    int armed, error, lasting;
    long at, count;
    char root[PATH_MAX], log[PATH_MAX], kinds[256];
};
static struct state *state;

__attribute__((constructor)) static void make(void) { /* the counter is shared with forked children, */
    const char *file = getenv("FAULT_STATE");         /* and through a file with spawned ones */
    int fd = file ? syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd < 0 || ftruncate(fd, sizeof *state)) return;
    void *found = mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) state = found;
    close(fd);
}

void fault_arm(const char *root, const char *log, const char *kinds, long at, int error, int lasting) {
    state->armed = 0;
    snprintf(state->root, sizeof state->root, "%s", root);
    snprintf(state->log, sizeof state->log, "%s", log);
    snprintf(state->kinds, sizeof state->kinds, "%s", kinds);
    state->at = at, state->error = error, state->lasting = lasting, state->count = 0;
    __sync_synchronize();
    state->armed = 1;
}

void fault_disarm(void) { state->armed = 0; }

static int under_root(const char *path) {
    size_t length = strlen(state->root);
    return !strncmp(path, state->root, length) && (path[length] == '/' || !path[length]);
}

/* Put the absolute path of `path`, relative to the open directory `fd`, into `out`, without resolving links. 0 if there is none. */
static int absolute(int fd, const char *path, char *out) {
    char link[64], base[PATH_MAX];
    if (!path) return 0;
    if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) < PATH_MAX;
    if (fd == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) < 0) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return 0;
        base[n] = 0;
    }
    return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
}

static int has(const char *kinds, const char *kind) {
    size_t length = strlen(kind);
    for (const char *p = kinds; (p = strstr(p, kind)); p += length)
        if ((p == kinds || p[-1] == ' ') && (!p[length] || p[length] == ' ')) return 1;
    return 0;
}

enum { GO = 0, FAIL = 1, KILL = 2 };

/* Count and log an event on an absolute path, and return what is to happen: GO, FAIL or KILL. */
static int event(const char *kind, const char *path) {
    if (!state || !state->armed || !under_root(path)) return GO;
    int saved = errno;
    long number = __sync_add_and_fetch(&state->count, 1);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path + strlen(state->root));
    int fd = syscall(SYS_openat, AT_FDCWD, state->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) {
        (void)!syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
    errno = saved;
    if (!state->at || number < state->at) return GO;
    if (!state->error) return number == state->at ? KILL : GO;
    if (number > state->at && !(state->lasting && has(state->kinds, kind))) return GO;
    return FAIL;
}

static int event_at(const char *kind, int fd, const char *path) {
    char full[PATH_MAX];
    return state && state->armed && absolute(fd, path, full) ? event(kind, full) : GO;
}

static int event_fd(const char *kind, int fd) {
    char link[64], path[PATH_MAX];
    if (!state || !state->armed) return GO;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return GO;
    path[n] = 0;
    return event(kind, path);
}

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

#define ACT(what, failed)                     \
    switch (what) {                           \
    case KILL: die();                         \
    case FAIL: errno = state->error; return failed; \
    }

static int opened(int fd, const char *path, int flags) {
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return GO;
    return event_at("open", fd, path);
}

#define MODE(flags)                           \
    mode_t mode = 0;                          \
    if ((flags) & (O_CREAT | O_TMPFILE)) {    \
        va_list more;                         \
        va_start(more, flags);                \
        mode = va_arg(more, mode_t);          \
        va_end(more);                         \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    ACT(opened(AT_FDCWD, path, flags), -1)
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    ACT(opened(AT_FDCWD, path, flags), -1)
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int openat(int fd, const char *path, int flags, ...) {
    MODE(flags)
    ACT(opened(fd, path, flags), -1)
    return syscall(SYS_openat, fd, path, flags, mode);
}
int openat64(int fd, const char *path, int flags, ...) {
    MODE(flags)
    ACT(opened(fd, path, flags), -1)
    return syscall(SYS_openat, fd, path, flags, mode);
}
int creat(const char *path, mode_t mode) { return open(path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open(path, O_WRONLY | O_CREAT | O_TRUNC, mode); }

FILE *fopen(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+")) ACT(event_at("open", AT_FDCWD, path), NULL)
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+")) ACT(event_at("open", AT_FDCWD, path), NULL)
    return REAL(fopen64)(path, mode);
}

ssize_t write(int fd, const void *data, size_t size) {
    int what = event_fd("write", fd);
    if (what == GO) return syscall(SYS_write, fd, data, size);
    (void)!syscall(SYS_write, fd, data, size / 2);
    if (what == KILL) die();
    errno = state->error;
    return -1;
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    ACT(event_fd("write", fd), -1)
    return syscall(SYS_writev, fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    ACT(event_fd("write", fd), -1)
    return syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    ACT(event_fd("write", fd), -1)
    return syscall(SYS_pwrite64, fd, data, size, at);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    static __typeof__(&fwrite) real;
    if (!real) real = REAL(fwrite);
    int what = state && state->armed ? event_fd("write", fileno(file)) : GO;
    if (what != GO) {
        real(data, size, count / 2, file);
        fflush(file);
        if (what == KILL) die();
        errno = state->error;
        return count / 2;
    }
    return real(data, size, count, file);
}
ssize_t sendfile(int out, int in, off_t *at, size_t count) {
    ACT(event_fd("write", out), -1)
    return syscall(SYS_sendfile, out, in, at, count);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t count) {
    ACT(event_fd("write", out), -1)
    return syscall(SYS_sendfile, out, in, at, count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    ACT(event_fd("write", out), -1)
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}
int ftruncate(int fd, off_t size) {
    ACT(event_fd("truncate", fd), -1)
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off64_t size) {
    ACT(event_fd("truncate", fd), -1)
    return syscall(SYS_ftruncate, fd, size);
}
int fsync(int fd) {
    ACT(event_fd("fsync", fd), -1)
    return syscall(SYS_fsync, fd);
}
int fdatasync(int fd) {
    ACT(event_fd("fsync", fd), -1)
    return syscall(SYS_fdatasync, fd);
}
int rename(const char *from, const char *to) {
    ACT(event_at("rename", AT_FDCWD, to), -1)
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int renameat(int one, const char *from, int other, const char *to) {
    ACT(event_at("rename", other, to), -1)
    return syscall(SYS_renameat2, one, from, other, to, 0);
}
int renameat2(int one, const char *from, int other, const char *to, unsigned flags) {
    ACT(event_at("rename", other, to), -1)
    return syscall(SYS_renameat2, one, from, other, to, flags);
}
int link(const char *from, const char *to) {
    ACT(event_at("link", AT_FDCWD, to), -1)
    return syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int linkat(int one, const char *from, int other, const char *to, int flags) {
    ACT(event_at("link", other, to), -1)
    return syscall(SYS_linkat, one, from, other, to, flags);
}
int symlink(const char *to, const char *path) {
    ACT(event_at("link", AT_FDCWD, path), -1)
    return syscall(SYS_symlinkat, to, AT_FDCWD, path);
}
int unlink(const char *path) {
    ACT(event_at("unlink", AT_FDCWD, path), -1)
    return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
int unlinkat(int fd, const char *path, int flags) {
    ACT(event_at("unlink", fd, path), -1)
    return syscall(SYS_unlinkat, fd, path, flags);
}
int rmdir(const char *path) {
    ACT(event_at("unlink", AT_FDCWD, path), -1)
    return syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}
int mkdir(const char *path, mode_t mode) {
    ACT(event_at("mkdir", AT_FDCWD, path), -1)
    return syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}
int mkdirat(int fd, const char *path, mode_t mode) {
    ACT(event_at("mkdir", fd, path), -1)
    return syscall(SYS_mkdirat, fd, path, mode);
}
