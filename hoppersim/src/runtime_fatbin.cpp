// The PTX text in a fat binary: plain, or compressed by LZ4 (CUDA 12) or zstd (CUDA 13).
#include <dlfcn.h>

#include <algorithm>

#include "runtime.h"

namespace hoppersim {

namespace {

struct FatWrapper {
  uint32_t magic, version;
  const uint8_t* data;
  void* linked;  // of version 2: the binaries that were linked
};
struct FatHeader {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;
};
struct FatEntry {
  uint16_t kind, version;
  uint32_t header_size;
  uint64_t size;  // of the payload, padded
  uint32_t compressed_size, options_offset;
  uint16_t minor, major;
  uint32_t architecture, name_offset, name_size;
  uint64_t flags, unknown, uncompressed_size;
};
static_assert(sizeof(FatEntry) == 64);
constexpr uint32_t kWrapperMagic = 0x466243b1, kHeaderMagic = 0xba55ed50, kLinkedVersion = 2;
constexpr uint16_t kKindPtx = 1, kKindMachineCode = 2;
constexpr uint64_t kLz4 = 1u << 13, kZstd = 1u << 15;
constexpr uint32_t kArchitecture = 90;
constexpr const char* kAdvice = "compile with -gencode arch=compute_90a,code=[compute_90a,sm_90a]";

[[noreturn]] void no_ptx(const std::string& text) { throw Fault("no ptx", text); }

// A block of the LZ4 format: literals and copies of what came before, in turn.
std::string lz4_decompressed(const uint8_t* at, size_t size, size_t uncompressed) {
  std::string text;
  text.reserve(uncompressed);
  const uint8_t* const end = at + size;
  auto length = [&](size_t nibble) {
    for (size_t more = 255; nibble >= 15 && more == 255 && at < end; nibble += more) more = *at++;
    return nibble;
  };
  while (at < end) {
    const uint8_t token = *at++;
    const size_t literals = length(token >> 4);
    if (literals > static_cast<size_t>(end - at)) break;
    text.append(reinterpret_cast<const char*>(at), literals);
    at += literals;
    if (at == end && text.size() == uncompressed) return text;
    if (end - at < 2) break;
    const size_t distance = at[0] | at[1] << 8;
    at += 2;
    const size_t copied = 4 + length(token & 15);
    if (distance == 0 || distance > text.size() || copied > uncompressed - text.size()) break;
    for (size_t k = 0; k < copied; ++k) text.push_back(text[text.size() - distance]);
  }
  no_ptx("the LZ4 data of the fat binary are damaged");
}

std::string zstd_decompressed(const uint8_t* data, size_t size, size_t uncompressed) {
  static void* const library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
  static auto* const decompress =
      library ? reinterpret_cast<size_t (*)(void*, size_t, const void*, size_t)>(dlsym(library, "ZSTD_decompress"))
              : nullptr;
  if (decompress == nullptr)
    no_ptx(
        "the PTX in the fat binary is compressed with zstd, and libzstd.so.1 cannot be loaded: install it (Debian: "
        "libzstd1), or compile with --no-compress");
  std::string text(uncompressed, '\0');
  if (decompress(text.data(), text.size(), data, size) != uncompressed)
    no_ptx("the zstd data of the fat binary are damaged");
  return text;
}

std::string text_of(const uint8_t* entry_address) {
  FatEntry entry;
  std::memcpy(&entry, entry_address, sizeof entry);
  const uint8_t* payload = entry_address + entry.header_size;
  std::string text;
  if (entry.flags & kLz4) {
    text = lz4_decompressed(payload, entry.compressed_size, entry.uncompressed_size);
  } else if (entry.flags & kZstd) {
    text = zstd_decompressed(payload, entry.compressed_size, entry.uncompressed_size);
  } else {
    text.assign(reinterpret_cast<const char*>(payload), entry.size);
  }
  text.erase(std::find(text.begin(), text.end(), '\0'), text.end());
  return text;
}

// What the device would take: code of sm_90a or sm_90, else the newest PTX that it can compile.
std::string text_of_container(const uint8_t* data) {
  FatHeader header;
  std::memcpy(&header, data, sizeof header);
  const uint8_t* const end = data + header.header_size + header.size;
  std::string best;
  uint32_t architecture = 0;
  bool machine_code = false;
  std::string found;
  for (const uint8_t* at = data + header.header_size; at + sizeof(FatEntry) <= end;) {
    FatEntry entry;
    std::memcpy(&entry, at, sizeof entry);
    const bool ptx = entry.kind == kKindPtx;
    if (ptx || entry.kind == kKindMachineCode)
      found += std::string(found.empty() ? "" : ", ") + (ptx ? "PTX" : "machine code") + " for " +
               std::to_string(entry.architecture);
    machine_code |= entry.kind == kKindMachineCode && entry.architecture == kArchitecture;
    if (ptx && entry.architecture <= kArchitecture && entry.architecture >= architecture) {
      std::string text = text_of(at);
      const bool specific = best.find(".target sm_90a") != std::string::npos;
      if (text.find(".version") != std::string::npos && !specific) {
        best = std::move(text);
        architecture = entry.architecture;
      }
    }
    at += entry.header_size + entry.size;
  }
  if (best.empty() || (machine_code && architecture < kArchitecture))
    no_ptx("the fat binary holds " + (found.empty() ? "nothing" : found) + ", and no PTX for sm_90a: " + kAdvice);
  return best;
}

}  // namespace

std::string ptx_of_image(const void* image) {
  uint32_t magic;
  std::memcpy(&magic, image, sizeof magic);
  if (magic == kHeaderMagic) return text_of_container(static_cast<const uint8_t*>(image));
  if (magic == kWrapperMagic) {
    const auto* wrapper = static_cast<const FatWrapper*>(image);
    if (wrapper->version == kLinkedVersion)
      no_ptx("device code linked from several files (-rdc=true) is machine code alone: compile with -rdc=false");
    return ptx_of_image(wrapper->data);
  }
  if (std::memcmp(&magic, "\177ELF", sizeof magic) == 0)
    no_ptx("the image is machine code: load its PTX or a fat binary instead");
  return static_cast<const char*>(image);
}

}  // namespace hoppersim
