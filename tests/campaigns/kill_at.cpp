// Kills the process at a chosen system call that changes or opens files: preloaded, armed by kill_at_arm.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

static std::atomic<long> calls{0};
static std::atomic<long> last{-1};  // the call that is not survived; negative: none

extern "C" void kill_at_arm(long n) {
  calls = 0;
  last = n;
}
extern "C" long kill_at_calls() { return calls; }

// True if this call is the last one.
static bool ends() { return last >= 0 && calls++ == last; }

static void die() { kill(getpid(), SIGKILL); }

template <class F>
static F real(F, const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

// Half of the calls are carried out before the process dies, so that it dies behind each of them too.
#define WATCH(type, name, parameters, arguments) \
  extern "C" type name parameters {              \
    static auto call = real(&name, #name);       \
    bool dies = ends();                          \
    if (dies && last % 2) die();                 \
    type result = call arguments;                \
    if (dies) die();                             \
    return result;                               \
  }

WATCH(int, rename, (const char* a, const char* b) noexcept, (a, b))
WATCH(int, renameat, (int i, const char* a, int j, const char* b) noexcept, (i, a, j, b))
WATCH(int, renameat2, (int i, const char* a, int j, const char* b, unsigned f) noexcept, (i, a, j, b, f))
WATCH(int, link, (const char* a, const char* b) noexcept, (a, b))
WATCH(int, linkat, (int i, const char* a, int j, const char* b, int f) noexcept, (i, a, j, b, f))
WATCH(int, symlink, (const char* a, const char* b) noexcept, (a, b))
WATCH(int, unlink, (const char* a) noexcept, (a))
WATCH(int, unlinkat, (int i, const char* a, int f) noexcept, (i, a, f))
WATCH(int, rmdir, (const char* a) noexcept, (a))
WATCH(int, mkdir, (const char* a, mode_t m) noexcept, (a, m))
WATCH(int, mkdirat, (int i, const char* a, mode_t m) noexcept, (i, a, m))
WATCH(int, chmod, (const char* a, mode_t m) noexcept, (a, m))
WATCH(int, fchmodat, (int i, const char* a, mode_t m, int f) noexcept, (i, a, m, f))
WATCH(int, fsync, (int i), (i))
WATCH(int, ftruncate, (int i, off_t n) noexcept, (i, n))
WATCH(int, ftruncate64, (int i, off64_t n) noexcept, (i, n))
WATCH(int, flock, (int i, int how) noexcept, (i, how))

// A write that is not survived writes half.
extern "C" ssize_t write(int i, const void* data, size_t n) {
  static auto call = real(&write, "write");
  bool dies = ends();
  ssize_t result = call(i, data, dies ? n / 2 : n);
  if (dies) die();
  return result;
}

extern "C" ssize_t writev(int i, const struct iovec* parts, int n) {
  static auto call = real(&writev, "writev");
  bool dies = ends();
  ssize_t result = call(i, parts, dies ? n / 2 : n);
  if (dies) die();
  return result;
}

#define WATCH_OPEN(name, first, names)                                   \
  extern "C" int name first {                                            \
    static auto call = real(&name, #name);                               \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
    va_end(rest);                                                        \
    bool dies = ends();                                                  \
    if (dies && last % 2) die();                                         \
    int result = call names;                                             \
    if (dies) die();                                                     \
    return result;                                                       \
  }
#define OPEN_PATH (path, flags, mode)
#define OPENAT_PATH (folder, path, flags, mode)

WATCH_OPEN(open, (const char* path, int flags, ...), OPEN_PATH)
WATCH_OPEN(open64, (const char* path, int flags, ...), OPEN_PATH)
WATCH_OPEN(openat, (int folder, const char* path, int flags, ...), OPENAT_PATH)
WATCH_OPEN(openat64, (int folder, const char* path, int flags, ...), OPENAT_PATH)
