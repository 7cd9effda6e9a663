// Memory that a kernel is the first to write.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jet::cpu::JET_CPU_ISA {

// Asks for huge pages (2 MB) below an output that is written all over. A large allocation is fresh memory: the first
// write to each of its pages stops in the system's kernel: 64 MB take 26 ms in pages of 4 KB and 12 ms in huge ones
// (one thread of a Xeon with AMX, in a VM). Does nothing for small outputs, where the system grants none, and where the
// pages are there already.
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p), begin = (first + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (bytes >= int64_t{4} << 20 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace jet::cpu::JET_CPU_ISA
