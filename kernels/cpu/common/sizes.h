// Arithmetic of sizes.
#pragma once
#include <cstdint>

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

constexpr int64_t kLine = 16;  // floats of a cache line

// A number of floats, rounded up to whole cache lines.
constexpr int64_t whole_lines(int64_t floats) { return round_up(floats, kLine); }

// The same, to an odd number of lines: the rows of a matrix with this stride start in different cache sets.
constexpr int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLine) | 1) * kLine; }

}  // namespace
