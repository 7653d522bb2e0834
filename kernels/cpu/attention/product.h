// Products of matrices of words, c = a @ b.
#pragma once
#include <cstdint>

namespace {

// The first operand: element (m, k) is at m * row + k * depth.
struct Elements {
  const float* data;
  int64_t row, depth;
};

// The second operand.
struct Rows {
  const float* data;
  int64_t stride;
};

// The result.
struct Sums {
  float* data;
  int64_t stride;
  bool add;  // to what is there
};

// Cache lines that will be read next. A product prefetches a few with each of its steps: many would hold it up.
struct Soon {
  const char* const* next = nullptr;
  const char* const* end = nullptr;
  void expect_one() {
    if (next != end) __builtin_prefetch(*next++);
  }
  void expect(int64_t lines) {  // in the second-level cache, as the first one may take few at a time
    for (; lines && next != end; --lines) __builtin_prefetch(*next++, 0, 2);
  }
};

}  // namespace
