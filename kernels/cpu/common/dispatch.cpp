// The choice of the instruction set, and the version of the C interface.
#include <cstring>

#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

Isa best_of_processor() {
#ifdef INSVP_FAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
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
INSVP_FAST_API int insvp_fast_abi_version() { return 8; }

// Selects the best instruction set of the processor that is not above `limit` ("": no limit). Returns its name, or null
// for an unknown limit.
INSVP_FAST_API const char* insvp_fast_select_isa(const char* limit) {
  using namespace insvp_fast;
  for (int level = static_cast<int>(Isa::avx512_bf16); level >= 0; --level) {
    if (*limit && std::strcmp(limit, kNames[level]) != 0) continue;
    const int top = static_cast<int>(best_of_processor());
    selected = static_cast<Isa>(level < top ? level : top);
    return kNames[static_cast<int>(selected)];
  }
  return nullptr;
}
