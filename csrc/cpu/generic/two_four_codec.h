// 2:4 packed and unpacked, by the vocabulary of codec.h: a 2:4 row is a bitmask row whose every nibble has two bits, so values of a group
// of 64 columns are 32 and no bit has to be counted.

// Of a group that has fewer than two non-zeros, zeros are stored as well: those that torch's CUTLASS layout takes. By the mask of
// non-zeros.
constexpr uint8_t kStoredOfGroup[16] = {0xc, 0x5, 0x6, 0x3, 0xc, 0x5, 0x6, 0, 0xc, 0x9, 0xa, 0, 0xc, 0, 0, 0};

// The nibbles of a mask word of `columns` <= 64 columns that do not have exactly two bits set.
inline uint64_t faulty_groups(uint64_t mask, int64_t columns) {
  const uint64_t pairs = mask - (mask >> 1 & 0x5555555555555555);
  const uint64_t counts = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
  const uint64_t whole = columns == kGroup ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  return counts ^ (0x2222222222222222 & whole);
}

inline int64_t first_faulty_metadata(const uint8_t* metadata, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* const bits = metadata + row * bitmask_bytes(cols);
    for (int64_t col = 0; col < cols; col += kGroup) {
      const int64_t columns = cols - col < kGroup ? cols - col : kGroup;
      uint64_t mask = 0;
      copy_bytes(&mask, bits + col / 8, bitmask_bytes(columns));
      if (faulty_groups(mask, columns) != 0) return row;
    }
  }
  return rows;
}

template <int W>
inline bool is_zero(const uint8_t* element, const ZeroTest& test) {
  bool zero = true;
  for (int i = 0; i < W; ++i) zero = zero && (element[i] & test.bytes[i]) == 0;
  return zero;
}

template <int W>
inline uint64_t magnitude_of(const uint8_t* element, Magnitude magnitude) {
  constexpr uint64_t kSign = uint64_t{1} << (8 * W - 1);
  uint64_t bits = 0;
  copy_bytes(&bits, element, W);
  switch (magnitude) {
    case Magnitude::kSigned:
      return (bits & kSign) != 0 ? (~bits + 1) & (2 * kSign - 1) : bits;
    case Magnitude::kSignMagnitude:
      return bits & (kSign - 1);
    case Magnitude::kNoNegativeZero:
      return bits == kSign ? bits : bits & (kSign - 1);
    default:
      return bits;
  }
}

// Which of four elements are not zero, as a nibble.
template <int W>
inline int nonzero_of_group(const uint8_t* group, const ZeroTest& test) {
  int nibble = 0;
  for (int i = 0; i < 4; ++i) nibble |= is_zero<W>(group + i * W, test) ? 0 : 1 << i;
  return nibble;
}

// The same, but for all but the two largest, of which the first ones stay where they are equal.
template <int W>
inline int largest_of_group(const uint8_t* group, const ZeroTest& test, Magnitude magnitude) {
  const int nonzero = nonzero_of_group<W>(group, test);
  int largest = 0;
  for (int i = 0; i < 4; ++i) {
    int larger = 0;
    for (int j = 0; j < 4; ++j) {
      const uint64_t own = magnitude_of<W>(group + i * W, magnitude), other = magnitude_of<W>(group + j * W, magnitude);
      larger += (nonzero >> j & 1) != 0 && (j < i ? other >= own : other > own) ? 1 : 0;
    }
    if ((nonzero >> i & 1) != 0 && larger < 2) largest |= 1 << i;
  }
  return largest;
}

template <int W>
inline void store_group(const uint8_t* group, int stored, int64_t col, uint8_t* values, uint8_t* metadata) {
  uint8_t* to = values + col / 2 * W;
  for (int i = 0; i < 4; ++i) {
    if ((stored >> i & 1) == 0) continue;
    copy_bytes(to, group + i * W, W);
    to += W;
  }
  metadata[col / 8] = static_cast<uint8_t>(col % 8 == 0 ? stored : metadata[col / 8] | stored << 4);
}

template <int W>
int64_t pack_24(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, void* values, uint8_t* metadata) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; col += 4) {
      const uint8_t* const group = static_cast<const uint8_t*>(dense) + (row * cols + col) * W;
      const int nonzero = nonzero_of_group<W>(group, zero_test);
      if (__builtin_popcount(static_cast<unsigned>(nonzero)) > 2) return row;
      store_group<W>(group, kStoredOfGroup[nonzero], col, static_cast<uint8_t*>(values) + row * (cols / 2) * W,
                     metadata + row * bitmask_bytes(cols));
    }
  }
  return rows;
}

template <int W>
void pack_largest_24(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude, void* values,
                     uint8_t* metadata) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; col += 4) {
      const uint8_t* const group = static_cast<const uint8_t*>(dense) + (row * cols + col) * W;
      store_group<W>(group, kStoredOfGroup[largest_of_group<W>(group, zero_test, magnitude)], col,
                     static_cast<uint8_t*>(values) + row * (cols / 2) * W, metadata + row * bitmask_bytes(cols));
    }
  }
}

template <int W>
int64_t unpack_24(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* dense) {
  for (int64_t row = 0; row < rows; ++row) {
    if (first_faulty_metadata(metadata + row * bitmask_bytes(cols), 1, cols) == 0) return row;
    const uint8_t* src = static_cast<const uint8_t*>(values) + row * (cols / 2) * W;
    uint8_t* dst = static_cast<uint8_t*>(dense) + row * cols * W;
    for (int64_t col = 0; col < cols; ++col, dst += W) {
      const bool stored = (metadata[row * bitmask_bytes(cols) + col / 8] >> (col % 8) & 1) != 0;
      if (stored) {
        copy_bytes(dst, src, W);
        src += W;
      } else {
        __builtin_memset(dst, 0, W);
      }
    }
  }
  return rows;
}

template <int W>
void prune_24(void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude) {
  for (int64_t group = 0; group < rows * cols; group += 4) {
    uint8_t* const elements = static_cast<uint8_t*>(dense) + group * W;
    const int stored = kStoredOfGroup[largest_of_group<W>(elements, zero_test, magnitude)];
    for (int i = 0; i < 4; ++i) {
      if ((stored >> i & 1) == 0) __builtin_memset(elements + i * W, 0, W);
    }
  }
}

template <int W>
constexpr TwoFourCodecKernels two_four_codec_kernels() {
  return {pack_24<W>, pack_largest_24<W>, unpack_24<W>, prune_24<W>};
}
