// Matrix tiles, where the instruction set has them (AMX): registers of 16 rows of 16 words. A word is a sum in fp32 or
// a pair of bf16 factors that are neighbors along the sum.
#pragma once
#ifdef INSVP_FAST_AMX
#include "common/sizes.h"
#include "common/vec.h"

namespace {

constexpr int kTile = 16;  // the rows of a tile, and the words of a row

// Gives all tiles their shape for as long as it lives. A function may change the shapes that its caller has set.
struct TileShapes {
  TileShapes() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } const shapes;
    asm volatile("ldtilecfg (%0)" : : "r"(&shapes) : "memory");
  }
  ~TileShapes() { asm volatile("tilerelease"); }
  TileShapes(const TileShapes&) = delete;
};

// The compilers' functions for single tiles take numbers that a template cannot give, and do not say what they read.
template <int TILE>
inline void load_tile_of_bytes(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%1, %2, 1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(bytes) : "memory");
}
// Its rows begin `words` apart, as below.
template <int TILE>
inline void load_tile(const void* from, int64_t words) {
  load_tile_of_bytes<TILE>(from, 4 * words);
}
// The same for what will not be needed again soon and may leave the first-level cache to the rest.
template <int TILE>
inline void load_tile_once(const void* from, int64_t words) {
  asm volatile("tileloaddt1 (%1, %2, 1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(4 * words) : "memory");
}
template <int TILE>
inline void store_tile(void* to, int64_t words) {
  asm volatile("tilestored %%tmm%c0, (%1, %2, 1)" : : "i"(TILE), "r"(to), "r"(4 * words) : "memory");
}
template <int TILE>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int SUMS, int A, int B>
inline void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

// A matrix, whose rows begin `stride` words apart.
template <class Word>
struct Matrix {
  Word* data;
  int64_t stride;
};

// Calls f(constant<ROWS>, constant<COLUMNS>) with the numbers of tiles that multiply_tiles takes, two of each at most.
template <class F>
inline void with_tiles(int64_t rows, int64_t columns, F f) {
  with_constant<2>(smaller(2, ceil_div(rows, kTile)), [&](auto down) {
    with_constant<2>(smaller(2, ceil_div(columns, kTile)), [&](auto across) { f(down, across); });
  });
}

enum class Once { no, yes };

// c [16 * ROWS, 16 * COLUMNS] = [c +] a [16 * ROWS, depth] @ b [depth, 16 * COLUMNS], of up to 2 by 2 tiles; the depth
// is in words, a multiple of 16. `meanwhile` is called once for every 16 of it. With ONCE, `a` leaves the first-level
// cache to what is read again.
template <int ROWS, int COLUMNS, Once ONCE, class Meanwhile>
inline void multiply_tiles(Matrix<float> c, Matrix<const uint32_t> a, Matrix<const uint32_t> b, int64_t depth, bool add,
                           const Meanwhile& meanwhile) {
  if (add) {
    load_tile<0>(c.data, c.stride);
    if constexpr (COLUMNS > 1) load_tile<1>(c.data + kTile, c.stride);
    if constexpr (ROWS > 1) load_tile<2>(c.data + kTile * c.stride, c.stride);
    if constexpr (ROWS > 1 && COLUMNS > 1) load_tile<3>(c.data + kTile * c.stride + kTile, c.stride);
  } else {
    clear_tile<0>();
    if constexpr (COLUMNS > 1) clear_tile<1>();
    if constexpr (ROWS > 1) clear_tile<2>();
    if constexpr (ROWS > 1 && COLUMNS > 1) clear_tile<3>();
  }
  const auto load_a = [&](auto tile, const uint32_t* from) {
    if constexpr (ONCE == Once::yes) load_tile_once<tile.value>(from, a.stride);
    else load_tile<tile.value>(from, a.stride);
  };
  for (int64_t k = 0; k < depth; k += kTile, a.data += kTile, b.data += kTile * b.stride) {
    load_a(constant<4>{}, a.data);
    load_tile<6>(b.data, b.stride);
    if constexpr (COLUMNS > 1) load_tile<7>(b.data + kTile, b.stride);
    multiply_tile<0, 4, 6>();
    if constexpr (COLUMNS > 1) multiply_tile<1, 4, 7>();
    if constexpr (ROWS > 1) {
      load_a(constant<5>{}, a.data + kTile * a.stride);
      multiply_tile<2, 5, 6>();
      if constexpr (COLUMNS > 1) multiply_tile<3, 5, 7>();
    }
    meanwhile();
  }
  store_tile<0>(c.data, c.stride);
  if constexpr (COLUMNS > 1) store_tile<1>(c.data + kTile, c.stride);
  if constexpr (ROWS > 1) store_tile<2>(c.data + kTile * c.stride, c.stride);
  if constexpr (ROWS > 1 && COLUMNS > 1) store_tile<3>(c.data + kTile * c.stride + kTile, c.stride);
}

}  // namespace
#else
struct TileShapes {};
#endif
