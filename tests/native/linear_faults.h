// Compressed weights that are faulty, or nothing but noise.
#pragma once

#include "linear_calls.h"

namespace bitmask::testing {

struct Fault {
  const char* name;
  void (*make)(Weight& weight, int64_t row, int64_t nnz);
};

inline uint8_t& mask_byte(Weight& weight, int64_t row, int64_t col) {
  return weight.bitmasks[static_cast<size_t>(row * bitmask_bytes(weight.cols) + col / 8)];
}

inline void flip(Weight& weight, int64_t row, int64_t col) {
  uint8_t& mask = mask_byte(weight, row, col);
  mask = static_cast<uint8_t>(mask ^ 1 << (col % 8));
}

inline int64_t& offset(Weight& weight, int64_t row) { return weight.row_offsets[static_cast<size_t>(row)]; }

constexpr Fault kFaults[] = {
    {"no fault", [](Weight&, int64_t, int64_t) {}},
    {"negative offset", [](Weight& w, int64_t row, int64_t) { offset(w, row) = -1; }},
    {"offset past the values", [](Weight& w, int64_t row, int64_t nnz) { offset(w, row) = nnz + 1; }},
    {"INT64_MIN", [](Weight& w, int64_t row, int64_t) { offset(w, row) = INT64_MIN; }},
    {"INT64_MAX", [](Weight& w, int64_t row, int64_t) { offset(w, row) = INT64_MAX; }},
    {"INT64_MIN + nnz", [](Weight& w, int64_t row, int64_t nnz) { offset(w, row) = INT64_MIN + nnz; }},
    {"offset off by one", [](Weight& w, int64_t row, int64_t) { offset(w, row) ^= 1; }},
    {"offset 0", [](Weight& w, int64_t row, int64_t) { offset(w, row) = 0; }},
    {"last offset", [](Weight& w, int64_t row, int64_t nnz) { offset(w, row) = nnz; }},
    {"wrong popcount", [](Weight& w, int64_t row, int64_t) { flip(w, row, random_below(w.cols)); }},
    {"all bits set",
     [](Weight& w, int64_t row, int64_t) { std::memset(&mask_byte(w, row, 0), 0xff, static_cast<size_t>(bitmask_bytes(w.cols))); }},
    {"no bit set",
     [](Weight& w, int64_t row, int64_t) { std::memset(&mask_byte(w, row, 0), 0, static_cast<size_t>(bitmask_bytes(w.cols))); }},
    {"padding bit", [](Weight& w, int64_t row, int64_t) { flip(w, row, bitmask_bytes(w.cols) * 8 - 1); }},
    {"bit moved to padding",
     [](Weight& w, int64_t row, int64_t) {
       for (int64_t col = 0; col < w.cols; ++col) {
         if (!bit(&mask_byte(w, row, 0), col)) continue;
         flip(w, row, col);
         return flip(w, row, bitmask_bytes(w.cols) * 8 - 1);
       }
     }},
};

// Nothing agrees with anything.
inline Weight garbage(const Weight& honest, int width) {
  Weight weight = honest;
  const int64_t nnz = static_cast<int64_t>(honest.values.size()) / width;
  weight.values.resize(static_cast<size_t>(random_below(2) == 0 ? nnz : random_below(nnz + 2)) * static_cast<size_t>(width), 0x5a);
  const int64_t bits = random_below(4), offsets = random_below(4);
  for (uint8_t& byte : weight.bitmasks) {
    if (bits > 0) byte = bits == 1 ? 0xff : bits == 2 ? static_cast<uint8_t>(random_word()) : static_cast<uint8_t>(byte | random_word());
  }
  for (int64_t& start : weight.row_offsets) {
    if (offsets > 0 && random_below(offsets) == 0)
      start = random_below(2) == 0 ? random_below(nnz + 4) - 2 : static_cast<int64_t>(random_word());
  }
  return weight;
}

inline Weight random_weight(const Format& format, int64_t rows, int64_t cols, double density) {
  std::vector<uint64_t> bits;
  std::vector<bool> kept;
  for (int64_t i = 0; i < rows * cols; ++i) {
    bits.push_back(random_word());
    kept.push_back(static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
  }
  return compress(format, rows, cols, bits, kept);
}

}  // namespace bitmask::testing
