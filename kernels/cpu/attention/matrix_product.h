// Products in matrix registers.
#pragma once
#include "common/amx.h"
#include "common/sizes.h"
#include "product.h"

namespace {

// c [rows, columns] = a [rows, depth] @ b [depth, columns], or added to c. Rows and columns are rounded up to whole
// tiles; the depth is in words, of whole tiles. Words of a row of `a` follow one another.
__attribute__((noinline)) void multiply(Sums c, Elements a, Rows b, int64_t rows, int64_t columns, int64_t depth,
                                        Soon& soon) {
  constexpr int kLines = 8;  // to be prefetched with each step
  const auto word = [](const float* x) { return reinterpret_cast<const uint32_t*>(x); };
  for (int64_t n = 0; n < columns; n += 2 * kTile)
    for (int64_t m = 0; m < rows; m += 2 * kTile)
      with_tiles(rows - m, columns - n, [&](auto down, auto across) {
        multiply_tiles<down.value, across.value, Once::no>({c.data + m * c.stride + n, c.stride},
                                                           {word(a.data + m * a.row), a.row},
                                                           {word(b.data + n), b.stride}, depth, c.add,
                                                           [&] { soon.expect(kLines); });
      });
}

}  // namespace
