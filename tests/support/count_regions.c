// Loaded before everything else (LD_PRELOAD): counts the parallel regions that libgomp opens for calls of
// torch_parallel_for, which is what the CPU kernels run their loops with. Linux with glibc.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Body)(int64_t, int64_t, void*);

static __thread int in_loop;
static int64_t regions;

int64_t count_regions(void) { return regions; }

static int library_path(struct dl_phdr_info* info, size_t size, void* wanted_and_found) {
  const char** pair = wanted_and_found;
  if (strstr(info->dlpi_name, pair[0]) == NULL) return 0;
  pair[1] = info->dlpi_name;
  return 1;
}

static void* original(const char* library, const char* name) {
  const char* pair[2] = {library, NULL};
  dl_iterate_phdr(library_path, pair);
  void* handle = pair[1] ? dlopen(pair[1], RTLD_NOLOAD | RTLD_LAZY) : NULL;
  void* function = handle ? dlsym(handle, name) : NULL;
  if (function == NULL) abort();
  return function;
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  static void (*real)(void (*)(void*), void*, unsigned, unsigned);
  if (real == NULL) real = original("libgomp", "GOMP_parallel");
  regions += in_loop;
  real(body, data, threads, flags);
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  static int32_t (*real)(int64_t, int64_t, int64_t, Body, void*);
  if (real == NULL) real = original("libtorch_cpu", "torch_parallel_for");
  in_loop = 1;
  const int32_t status = real(begin, end, grain, body, context);
  in_loop = 0;
  return status;
}
