// Products with a bitmask weight [rows, cols] of elements of `width` bytes, split over threads: those of a 2:4 weight take them too where
// they have no kernel of their own. They return the first faulty row that a kernel meets (what has been written to y is then worthless),
// or w.rows.
#pragma once

#include "cpu/kernels.h"
#include "layout.h"

namespace bitmask {

// y [m, rows] = x [m, cols] W^T + bias, for any m. `bias` may be null.
int64_t multiply(const cpu::LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* x, int64_t m, const void* bias, uint8_t* y,
                 int64_t width);

// y [m, cols] = g [m, rows] W, for any m, of a weight that has been proven: only the offsets are looked at.
int64_t multiply_transposed(const cpu::LinearKernels& kernels, const BitmaskMatrix& w, const uint8_t* g, int64_t m, uint8_t* y,
                            int64_t width);

}  // namespace bitmask
