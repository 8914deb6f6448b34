// 2:4 packed, unpacked and pruned: a 2:4 row is a bitmask row (codec.h) whose every nibble has two bits set. So a group of 64 columns has
// 32 values at a place that is known before the metadata is read: no bit is counted, vectors are halved exactly, and no range is overrun.
//
// Rows whose metadata ends with a whole byte follow each other without a gap, in all three of dense elements, values and metadata, and are
// walked as one long row. Its last columns go through stack buffers, as in codec.h, as do those of each row where cols % 8 is 4.
//
// Included inside an anonymous namespace, after codec.h; it adds to the vocabulary:
//   Simd::compress_pairs<W>(src, mask, dst)  packs the 32 elements that a mask with two bits in each nibble marks; writes no other
//   Simd::expand_pairs<W>(src, mask, dst)    spreads 32 elements over 64, zeros between them; reads no other
//   Simd::kFoursBytes<W>                     bytes of the vectors of W-byte integers, whole fours of them, that the next two take
//   Simd::permute_fours<W, A, B, C, D>(v)    in each four, the lanes with these numbers
//   Simd::at_least<W>(a, b)                  mask word of the lanes with a >= b

constexpr int64_t kStored = kGroup / 2;           // values of a group
constexpr uint64_t kFirsts = 0x1111111111111111;  // the first column of each four

// ---- Mask words

// Set bits of each nibble, in that nibble.
inline uint64_t count_fours(uint64_t mask) {
  const uint64_t pairs = mask - (mask >> 1 & 0x5555555555555555);
  return (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
}

// The nibbles of a mask word of `columns` <= 64 columns that do not have exactly two bits set; past the columns, those that are not zero.
inline uint64_t faulty_groups(uint64_t mask, int64_t columns) {
  const uint64_t whole = columns == kGroup ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  return count_fours(mask) ^ (2 * kFirsts & whole);
}

// The nibbles with more than two bits set: adding 5 to 3 or 4 carries into the topmost bit.
inline uint64_t crowded_groups(uint64_t mask) { return (count_fours(mask) + 5 * kFirsts) & 8 * kFirsts; }

// Of nibbles with at most two bits set, those with fewer mark zeros as well, the ones that torch's CUTLASS layout takes:
//   non-zero columns   none   0     1     2     3
//   stored             2, 3   0, 2  1, 2  2, 3  2, 3
// So column 2 is always among them, and column 3 where neither 0 nor 1 is.
inline uint64_t complete_groups(uint64_t mask) {
  const uint64_t few = ~(count_fours(mask) >> 1) & kFirsts;
  const uint64_t neither = few & ~(mask | mask >> 1);
  return mask | few << 2 | neither << 3;
}

inline uint64_t load_metadata(const uint8_t* bits, int64_t columns) {
  uint64_t mask = 0;
  copy_bytes(&mask, bits, bitmask_bytes(columns));
  return mask;
}

// ---- The two largest of four

template <int W>
struct IntegerOf;
template <>
struct IntegerOf<1> {
  using Signed = int8_t;
  using Unsigned = uint8_t;
};
template <>
struct IntegerOf<2> {
  using Signed = int16_t;
  using Unsigned = uint16_t;
};
template <>
struct IntegerOf<4> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct IntegerOf<8> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
};

// The compiler's own vectors of W-byte integers.
template <int W>
struct Integers {
  using Bits = typename IntegerOf<W>::Unsigned;
  static constexpr int kLanes = Simd::template kFoursBytes<W> / W;
  typedef Bits Unsigned __attribute__((vector_size(kLanes * W)));
  typedef typename IntegerOf<W>::Signed Signed __attribute__((vector_size(kLanes * W)));
};

// Numbers that compare as magnitudes do. Zeros come before everything else, also before a negative zero that is not taken for one: they are
// negative, or wrap around to -1 where 1 is taken from them. So does the sign alone, to the largest number.
template <int W>
__attribute__((always_inline)) inline typename Integers<W>::Signed magnitude_keys(const uint8_t* src, const ZeroTest& test,
                                                                                  Magnitude magnitude) {
  using Unsigned = typename Integers<W>::Unsigned;
  using Signed = typename Integers<W>::Signed;
  using Bits = typename Integers<W>::Bits;
  constexpr Bits kOne = 1, kSign = kOne << (8 * W - 1), kOthers = kSign - 1;
  const Unsigned elements = load_as<Unsigned>(src);
  const Unsigned zero = reinterpret_cast<Unsigned>((elements & load_as<Bits>(test.bytes)) == 0);
  const Unsigned negative = reinterpret_cast<Unsigned>(reinterpret_cast<Signed>(elements) < 0);
  switch (magnitude) {
    case Magnitude::kSigned:
      return reinterpret_cast<Signed>((elements ^ negative) - negative - kOne);
    case Magnitude::kSignMagnitude:
      return reinterpret_cast<Signed>((elements & kOthers) | zero);
    case Magnitude::kNoNegativeZero:
      return reinterpret_cast<Signed>(((elements - kOne) & kOthers) | zero);
    default:
      return reinterpret_cast<Signed>(elements ^ kSign);
  }
}

// The mask word of the two largest magnitudes in each four of 64 elements, less those that are zero. Of equal ones the first come first.
// Each of the six pairs of a four is compared once, the earlier one winning a tie; who wins at least two of three comparisons stays.
template <int W>
inline uint64_t largest_two(const uint8_t* src, const ZeroTest& test, Magnitude magnitude) {
  uint64_t next = 0, second = 0;  // columns 0, 1, 2, 0 against 1, 2, 3, 3; columns 0, 1 against 2, 3
  for (int at = 0; at < kGroup; at += Integers<W>::kLanes) {
    const auto keys = magnitude_keys<W>(src + at * W, test, magnitude);
    const auto before = Simd::template permute_fours<W, 0, 1, 2, 0>(keys), behind = Simd::template permute_fours<W, 1, 2, 3, 3>(keys);
    next |= Simd::template at_least<W>(before, behind) << at;
    second |= Simd::template at_least<W>(keys, Simd::template permute_fours<W, 2, 3, 2, 3>(keys)) << at;
  }
  const uint64_t over_next = next ^ 8 * kFirsts;
  const uint64_t over_previous = ~((over_next << 1 & 14 * kFirsts) | (over_next >> 3 & kFirsts));
  const uint64_t over_second = (second & 3 * kFirsts) | (~second & 3 * kFirsts) << 2;
  return ((over_next & over_second) | (over_previous & (over_next | over_second))) & Simd::template nonzero<W>(src, test);
}

// ---- Kernels
//
// With AVX-512 and AVX2 all are bound by memory. On Zen 5, 64 MB in, fresh memory out, whose page faults are most of the time: pack takes
// 0.5 to 0.8 of what clone() does, pack_largest 0.6 to 0.95, unpack 0.8 to 0.95; prune, in place, 0.2 to 0.5.

// Calls group(at, byte, columns) for each group of columns: the element and the byte of metadata it begins with. Returns the row of the
// first nibble that is set in what it returns, or `rows`.
template <class Group>
__attribute__((always_inline)) inline int64_t walk_groups(int64_t rows, int64_t cols, const Group& group) {
  const bool gapless = cols % 8 == 0;
  const int64_t lines = gapless ? 1 : rows, length = gapless ? rows * cols : cols, tail = length % kGroup;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t first = line * length, first_byte = line * bitmask_bytes(length);
    for (int64_t col = 0; col < length - tail; col += kGroup) {
      const uint64_t found = group(first + col, first_byte + col / 8, kGroup);
      if (found != 0) return gapless ? (col + __builtin_ctzll(found)) / cols : line;
    }
    if (tail != 0) {
      const int64_t col = length - tail;
      const uint64_t found = group(first + col, first_byte + col / 8, tail);
      if (found != 0) return gapless ? (col + __builtin_ctzll(found)) / cols : line;
    }
  }
  return rows;
}

inline int64_t first_faulty_metadata(const uint8_t* metadata, int64_t rows, int64_t cols) {
  return walk_groups(rows, cols, [&](int64_t, int64_t byte, int64_t columns) __attribute__((always_inline)) {
    return faulty_groups(load_metadata(metadata + byte, columns), columns);
  });
}

// Packs what marks(src) is the mask word of, as far as there are no more than two in each four.
template <int W, class Marks>
__attribute__((always_inline)) inline int64_t pack_marked(const void* dense, int64_t rows, int64_t cols, void* values, uint8_t* metadata,
                                                          const Marks& marks) {
  const uint8_t* const elements = static_cast<const uint8_t*>(dense);
  uint8_t* const packed = static_cast<uint8_t*>(values);
  return walk_groups(rows, cols, [&](int64_t at, int64_t byte, int64_t columns) __attribute__((always_inline)) {
    uint8_t edge[kGroup * W], packed_edge[kStored * W];
    const uint8_t* src = elements + at * W;
    if (columns == kGroup) {
      prefetch_group<W>(src);
    } else {
      __builtin_memset(edge, 0, sizeof(edge));
      copy_bytes(edge, src, columns * W);
      src = edge;
    }
    const uint64_t marked = marks(src), crowded = crowded_groups(marked);
    if (crowded != 0) return crowded;
    uint64_t stored = complete_groups(marked);
    if (columns == kGroup) {
      Simd::template compress_pairs<W>(src, stored, packed + at / 2 * W);
    } else {
      Simd::template compress_pairs<W>(src, stored, packed_edge);
      copy_bytes(packed + at / 2 * W, packed_edge, columns / 2 * W);
      stored &= (uint64_t{1} << columns) - 1;
    }
    copy_bytes(metadata + byte, &stored, bitmask_bytes(columns));
    return crowded;
  });
}

template <int W>
int64_t pack_24(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, void* values, uint8_t* metadata) {
  const ZeroTest test = zero_test;  // a local copy stays in registers: the byte stores below cannot alias it
  const auto marks = [&](const uint8_t* src) __attribute__((always_inline)) { return Simd::template nonzero<W>(src, test); };
  return pack_marked<W>(dense, rows, cols, values, metadata, marks);
}

template <int W>
void pack_largest_24(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude, void* values,
                     uint8_t* metadata) {
  const ZeroTest test = zero_test;
  const auto marks = [&](const uint8_t* src) __attribute__((always_inline)) { return largest_two<W>(src, test, magnitude); };
  pack_marked<W>(dense, rows, cols, values, metadata, marks);
}

template <int W>
int64_t unpack_24(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* dense) {
  const uint8_t* const packed = static_cast<const uint8_t*>(values);
  uint8_t* const elements = static_cast<uint8_t*>(dense);
  return walk_groups(rows, cols, [&](int64_t at, int64_t byte, int64_t columns) __attribute__((always_inline)) {
    const uint8_t* const src = packed + at / 2 * W;
    const uint64_t mask = load_metadata(metadata + byte, columns), faulty = faulty_groups(mask, columns);
    if (faulty != 0) return faulty;
    if (columns == kGroup) {
      prefetch_bytes<kStored * W>(src, kPrefetchBytes);
      Simd::template expand_pairs<W>(src, mask, elements + at * W);
    } else {
      uint8_t edge[kGroup * W], packed_edge[kStored * W] = {};
      copy_bytes(packed_edge, src, columns / 2 * W);
      Simd::template expand_pairs<W>(packed_edge, mask, edge);
      copy_bytes(elements + at * W, edge, columns * W);
    }
    return faulty;
  });
}

// Sets 64 elements to zero but for those marked by a mask with two bits in each nibble.
template <int W>
inline void keep_pairs(uint8_t* elements, uint64_t mask) {
  uint8_t packed[kStored * W];
  Simd::template compress_pairs<W>(elements, mask, packed);
  Simd::template expand_pairs<W>(packed, mask, elements);
}

template <int W>
void prune_24(void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude) {
  const ZeroTest test = zero_test;
  uint8_t* const elements = static_cast<uint8_t*>(dense);
  walk_groups(rows, cols, [&](int64_t at, int64_t, int64_t columns) __attribute__((always_inline)) {
    uint8_t edge[kGroup * W];
    uint8_t* group = elements + at * W;
    if (columns == kGroup) {
      prefetch_group<W>(group);
    } else {
      __builtin_memset(edge, 0, sizeof(edge));
      copy_bytes(edge, group, columns * W);
      group = edge;
    }
    keep_pairs<W>(group, complete_groups(largest_two<W>(group, test, magnitude)));
    if (columns != kGroup) copy_bytes(elements + at * W, edge, columns * W);
    return uint64_t{0};
  });
}

template <int W>
constexpr TwoFourCodecKernels two_four_codec_kernels() {
  return {pack_24<W>, pack_largest_24<W>, unpack_24<W>, prune_24<W>};
}
