// copy: from one strided tensor to another, or zeros. Numbers that follow one another in both are one run of bytes.
#include <cstring>

#include "common/step.h"
#include "common/threads.h"

namespace {

constexpr int64_t kShared = 1 << 20;  // bytes: threads share larger copies

}  // namespace

// Copies n0 * n1 * n2 * n3 * n4 runs of `run` bytes; strides are in bytes too. Without `from`, writes zeros.
INSVP_FAST_API int copy(void* to, const void* from, int64_t run, int64_t n0, int64_t n1, int64_t n2, int64_t n3,
                        int64_t n4, int64_t to0, int64_t to1, int64_t to2, int64_t to3, int64_t to4, int64_t from0,
                        int64_t from1, int64_t from2, int64_t from3, int64_t from4, int threads) {
  const int64_t rows = n0 * n1 * n2, parts = rows * n3 * n4 * run > kShared ? smaller(rows, 4 * threads) : 1;
  for_each_job(parts, useful_threads(threads, parts), nullptr, 0, [=](int64_t part, float*) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      const int64_t i = row / n2 / n1, j = row / n2 % n1, k = row % n2;
      for (int64_t l = 0; l < n3; ++l)
        for (int64_t m = 0; m < n4; ++m) {
          char* target = static_cast<char*>(to) + i * to0 + j * to1 + k * to2 + l * to3 + m * to4;
          const int64_t source = i * from0 + j * from1 + k * from2 + l * from3 + m * from4;
          if (from) std::memcpy(target, static_cast<const char*>(from) + source, run);
          else std::memset(target, 0, run);
        }
    }
  });
  return 0;
}

INSVP_FAST_STEP(copy)
