// For the files that hold the C functions: arithmetic of sizes, threads, memory. Not for those of an instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

inline int thread_id() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Aligned memory handed out piece by piece; all pieces are whole cache lines.
struct Workspace {
  float *base, *next;
  explicit Workspace(int64_t floats)
      : base(static_cast<float*>(std::aligned_alloc(64, larger(floats, 16) * sizeof(float)))), next(base) {}
  ~Workspace() { std::free(base); }
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
};

}  // namespace
