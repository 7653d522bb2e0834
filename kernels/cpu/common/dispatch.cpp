// The choice of the instruction set, and the version of the C interface.
#include <cstring>
#ifdef INSVP_FAST_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef INSVP_FAST_AMX
// Whether the processor multiplies tiles of bf16, and the system lets this process do it.
bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
  return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
[[maybe_unused]] bool has_tiles() { return false; }
#endif

// The best instruction set of the processor, up to `limit`: what tiles cost a process is not paid without them.
Isa best_of_processor([[maybe_unused]] Isa limit) {
#ifdef INSVP_FAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return Isa::avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return limit >= Isa::amx && has_tiles() ? Isa::amx : Isa::avx512_bf16;
  }
#endif
  return Isa::generic;
}

Isa selected = Isa::generic;  // until insvp_fast_select_isa, which the loader calls first

}  // namespace

Isa isa(Isa limit) { return selected < limit ? selected : limit; }

}  // namespace insvp_fast

// To be raised, with ABI in insvp_fast/runtime/native/library.py, whenever an exported function is added or changed:
// the loader refuses a library of another version.
INSVP_FAST_API int insvp_fast_abi_version() { return 15; }

// Selects the best instruction set of the processor that is not above `limit` ("": no limit). Returns its name, or null
// for an unknown limit.
INSVP_FAST_API const char* insvp_fast_select_isa(const char* limit) {
  using namespace insvp_fast;
  for (int level = static_cast<int>(Isa::amx); level >= 0; --level) {
    if (*limit && std::strcmp(limit, kNames[level]) != 0) continue;
    const int top = static_cast<int>(best_of_processor(static_cast<Isa>(level)));
    selected = static_cast<Isa>(level < top ? level : top);
    return kNames[static_cast<int>(selected)];
  }
  return nullptr;
}
