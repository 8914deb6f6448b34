// The kernels' vector vocabulary for AVX-512 F+BW+VL+VBMI2: one compress or expand instruction a vector.
//
// Compressed vectors are stored whole and overlap: a compressing store to memory is microcode on Zen 4, and a masked one is slower than
// the bytes it saves. Zero-masked compress and expand wait for the old value of their destination on Zen 4 and 5, so both merge into a
// zero that the compiler cannot recognise.
inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  asm volatile("" : "+v"(zero));
  return zero;
}

// The positions of the columns of a group.
struct Positions {
  alignas(64) uint8_t bytes[64];
  constexpr Positions() : bytes() {
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i);
  }
};
constexpr Positions kPositions{};

struct Simd {
  template <int W>
  static uint64_t nonzero(const uint8_t* src, const ZeroTest& test) {
    const __m512i tested = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(test.bytes)));
    uint64_t mask = 0;
    for (int vector = 0; vector < W; ++vector) mask |= nonzero_lanes<W>(load(src + vector * 64), tested) << (vector * (64 / W));
    return mask;
  }

  template <int W>
  static uint8_t* compress(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < W; ++vector) {
      const uint64_t lanes = lanes_of<W>(mask, vector);
      _mm512_storeu_si512(dst, compress_lanes<W>(zero, lanes, load(src + vector * 64)));
      dst += __builtin_popcountll(lanes) * W;
    }
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < W; ++vector) _mm512_storeu_si512(dst + vector * 64, expand_vector<W>(zero, src, mask, vector));
    return src + __builtin_popcountll(mask) * W;
  }

  template <int W>
  static void compress_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < W; ++vector) {
      const __m512i packed = compress_lanes<W>(zero, lanes_of<W>(mask, vector), load(src + vector * 64));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + vector * 32), _mm512_castsi512_si256(packed));
    }
  }

  template <int W>
  static void expand_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < W; ++vector) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + vector * 32));
      _mm512_storeu_si512(dst + vector * 64, expand_lanes<W>(zero, lanes_of<W>(mask, vector), _mm512_castsi256_si512(packed)));
    }
  }

  template <int W>
  static constexpr int kFoursBytes = 64;

  template <int W, int A, int B, int C, int D, class Vector>
  static Vector permute_fours(Vector lanes) {
    const __m512i v = reinterpret_cast<__m512i>(lanes);
    constexpr int kOrder = A | B << 2 | C << 4 | D << 6;
    if constexpr (W == 1) {
      const __m512i fours = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
      const __m512i order = _mm512_set1_epi32(A | B << 8 | C << 16 | D << 24);
      return reinterpret_cast<Vector>(_mm512_shuffle_epi8(v, _mm512_or_si512(fours, order)));
    } else if constexpr (W == 2) {
      return reinterpret_cast<Vector>(_mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v, kOrder), kOrder));
    } else if constexpr (W == 4) {
      return reinterpret_cast<Vector>(_mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(kOrder)));
    } else {
      return reinterpret_cast<Vector>(_mm512_permutex_epi64(v, kOrder));
    }
  }

  template <int W, class Vector>
  static uint64_t at_least(Vector a, Vector b) {
    const __m512i left = reinterpret_cast<__m512i>(a), right = reinterpret_cast<__m512i>(b);
    if constexpr (W == 1) return _mm512_cmpge_epi8_mask(left, right);
    if constexpr (W == 2) return _mm512_cmpge_epi16_mask(left, right);
    if constexpr (W == 4) return _mm512_cmpge_epi32_mask(left, right);
    if constexpr (W == 8) return _mm512_cmpge_epi64_mask(left, right);
  }

  // Positions are packed as bytes, then widened eight at a time: as many stores as there are vectors to fill.
  static int64_t* list(uint64_t mask, int64_t first, int64_t* dst) {
    alignas(64) uint8_t positions[64];
    _mm512_store_si512(positions, _mm512_mask_compress_epi8(opaque_zero(), mask, load(kPositions.bytes)));
    const int64_t count = __builtin_popcountll(mask);
    for (int64_t i = 0; i < count; i += 8) {
      const __m512i eight = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(positions + i)));
      _mm512_storeu_si512(dst + i, _mm512_add_epi64(eight, _mm512_set1_epi64(first)));
    }
    return dst + count;
  }

  // The vector-th 64 bytes of a group. Where its elements lie is counted from the start of the group, not from the vector before: so only
  // one addition a group waits for the group before.
  template <int W>
  static __m512i expand_vector(__m512i zero, const uint8_t* src, uint64_t mask, int vector) {
    const uint64_t before = vector == 0 ? 0 : mask << (64 - vector * (64 / W));
    return expand_lanes<W>(zero, lanes_of<W>(mask, vector), load(src + __builtin_popcountll(before) * W));
  }

 private:
  static __m512i load(const uint8_t* src) { return _mm512_loadu_si512(src); }

  // The mask bits of the vector-th 64 bytes of a group.
  template <int W>
  static uint64_t lanes_of(uint64_t mask, int vector) {
    return mask >> (vector * (64 / W)) & ~uint64_t{0} >> (64 - 64 / W);
  }

  // One bit for each W-byte element of `v` that has a tested bit set. 16-byte elements are pairs of 8-byte lanes.
  template <int W>
  static uint64_t nonzero_lanes(__m512i v, __m512i tested) {
    if constexpr (W == 1) return _mm512_test_epi8_mask(v, tested);
    if constexpr (W == 2) return _mm512_test_epi16_mask(v, tested);
    if constexpr (W == 4) return _mm512_test_epi32_mask(v, tested);
    if constexpr (W == 8) return _mm512_test_epi64_mask(v, tested);
    if constexpr (W == 16) {
      const unsigned halves = _mm512_test_epi64_mask(v, tested);
      return _pext_u32(halves | halves >> 1, 0x55);
    }
  }

  // The 8-byte lanes of the 16-byte elements marked in `lanes`.
  static __mmask8 pairs(uint64_t lanes) { return static_cast<__mmask8>(_pdep_u32(static_cast<uint32_t>(lanes), 0x55) * 3); }

  template <int W>
  static __m512i compress_lanes(__m512i zero, uint64_t lanes, __m512i v) {
    if constexpr (W == 1) return _mm512_mask_compress_epi8(zero, static_cast<__mmask64>(lanes), v);
    if constexpr (W == 2) return _mm512_mask_compress_epi16(zero, static_cast<__mmask32>(lanes), v);
    if constexpr (W == 4) return _mm512_mask_compress_epi32(zero, static_cast<__mmask16>(lanes), v);
    if constexpr (W == 8) return _mm512_mask_compress_epi64(zero, static_cast<__mmask8>(lanes), v);
    if constexpr (W == 16) return _mm512_mask_compress_epi64(zero, pairs(lanes), v);
  }

  template <int W>
  static __m512i expand_lanes(__m512i zero, uint64_t lanes, __m512i v) {
    if constexpr (W == 1) return _mm512_mask_expand_epi8(zero, static_cast<__mmask64>(lanes), v);
    if constexpr (W == 2) return _mm512_mask_expand_epi16(zero, static_cast<__mmask32>(lanes), v);
    if constexpr (W == 4) return _mm512_mask_expand_epi32(zero, static_cast<__mmask16>(lanes), v);
    if constexpr (W == 8) return _mm512_mask_expand_epi64(zero, static_cast<__mmask8>(lanes), v);
    if constexpr (W == 16) return _mm512_mask_expand_epi64(zero, pairs(lanes), v);
  }
};

// ---- Lanes of the linear kernels (generic/lanes.h says what they hold)

// Sixteen fp32 sums.
struct Float32Sums {
  using Sum = float;
  using Sums = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kPanelRows = 12;
  static constexpr int kStreamedRows = 8;
  static constexpr int kStreamSums = 16;
  static constexpr int kMicroRows = 8;
  static constexpr int kMicroVectors = 3;
  using Selectors = __m512i;

  static Selectors load_selectors(const uint8_t* src) { return _mm512_loadu_si512(src); }
  template <class Words>
  static Words look_up(const uint32_t (&table)[16], Words nibbles) {
    return reinterpret_cast<Words>(_mm512_permutexvar_epi32(reinterpret_cast<__m512i>(nibbles), _mm512_load_si512(table)));
  }
  static Sums zero() { return _mm512_setzero_ps(); }
  static Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static Sum reduce(Sums sums) { return _mm512_reduce_add_ps(sums); }
  static Sums load_sums(const uint8_t* src) { return _mm512_loadu_ps(src); }
  static void store_sums(Sums sums, uint8_t* dst) { _mm512_storeu_ps(dst, sums); }

  // Sixteen rows of 32-bit lanes: pairs of rows are interleaved by lanes, then by pairs of lanes; what is then left to exchange are whole
  // quarters of vectors.
  static void transpose(const uint8_t* src, int64_t stride, uint8_t* dst) {
    __m512i pairs[16], quads[16];
    for (int row = 0; row < 16; row += 2) {
      const __m512i even = _mm512_loadu_si512(src + row * stride);
      const __m512i odd = _mm512_loadu_si512(src + (row + 1) * stride);
      pairs[row] = _mm512_unpacklo_epi32(even, odd);
      pairs[row + 1] = _mm512_unpackhi_epi32(even, odd);
    }
    for (int row = 0; row < 16; row += 4) {
      for (int half = 0; half < 2; ++half) {
        quads[row + 2 * half] = _mm512_unpacklo_epi64(pairs[row + half], pairs[row + half + 2]);
        quads[row + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[row + half], pairs[row + half + 2]);
      }
    }
    for (int lane = 0; lane < 4; ++lane) {  // quads[4 i + lane] holds lanes lane, lane + 4, ... of rows 4 i to 4 i + 3
      const __m512i low02 = _mm512_shuffle_i32x4(quads[lane], quads[4 + lane], 0x88);
      const __m512i low13 = _mm512_shuffle_i32x4(quads[lane], quads[4 + lane], 0xdd);
      const __m512i high02 = _mm512_shuffle_i32x4(quads[8 + lane], quads[12 + lane], 0x88);
      const __m512i high13 = _mm512_shuffle_i32x4(quads[8 + lane], quads[12 + lane], 0xdd);
      _mm512_storeu_si512(dst + lane * 64, _mm512_shuffle_i32x4(low02, high02, 0x88));
      _mm512_storeu_si512(dst + (lane + 4) * 64, _mm512_shuffle_i32x4(low13, high13, 0x88));
      _mm512_storeu_si512(dst + (lane + 8) * 64, _mm512_shuffle_i32x4(low02, high02, 0xdd));
      _mm512_storeu_si512(dst + (lane + 12) * 64, _mm512_shuffle_i32x4(low13, high13, 0xdd));
    }
  }
};

// One column in each lane, multiplied in fp32.
struct Float32Operands : Float32Sums {
  using Lanes = __m512;
  static constexpr int kDepth = 1;

  static Lanes load(const uint8_t* src) { return _mm512_loadu_ps(src); }
  static void store(Lanes lanes, uint8_t* dst) { _mm512_storeu_ps(dst, lanes); }
  static Lanes broadcast(const uint8_t* src) { return _mm512_set1_ps(load_as<float>(src)); }
  static Sums multiply_add(Lanes a, Lanes b, Sums sums) { return _mm512_fmadd_ps(a, b, sums); }

  // Selected across the whole vector: on Zen 5 the load that repeats four columns is a shuffle as well.
  static constexpr int kSelectedFrom = 16;
  using Columns = __m512;
  static Columns load_columns(const uint8_t* src) { return load(src); }
  static Lanes select(Columns columns, Selectors numbers) { return _mm512_permutexvar_ps(numbers, columns); }
};

struct Float32Lanes : Float32Operands {
  using Element = Float32Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[4]) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < 4; ++vector) lanes[vector] = _mm512_castsi512_ps(Simd::expand_vector<4>(zero, src, mask, vector));
    return src + __builtin_popcountll(mask) * 4;
  }
  static Lanes widen(const uint8_t* src) { return load(src); }
  static void round(Sums sums, uint8_t* dst) { _mm512_storeu_ps(dst, sums); }
};

struct Float16Lanes : Float32Operands {
  using Element = Float16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[4]) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < 2; ++vector) {
      const __m512i halves = Simd::expand_vector<2>(zero, src, mask, vector);
      lanes[2 * vector] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
      lanes[2 * vector + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
    return src + __builtin_popcountll(mask) * 2;
  }
  static Lanes widen(const uint8_t* src) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src))); }
  static void round(Sums sums, uint8_t* dst) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// bf16 widened to fp32, for machines without AVX512_BF16.
struct WidenedBfloat16Lanes : Float32Operands {
  using Element = Bfloat16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[4]) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < 2; ++vector) {
      const __m512i halves = Simd::expand_vector<2>(zero, src, mask, vector);
      lanes[2 * vector] = widen(_mm512_castsi512_si256(halves));
      lanes[2 * vector + 1] = widen(_mm512_extracti64x4_epi64(halves, 1));
    }
    return src + __builtin_popcountll(mask) * 2;
  }
  static Lanes widen(const uint8_t* src) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src))); }

  // Bfloat16Element::narrow in each lane.
  static void round(Sums sums, uint8_t* dst) {
    const __m512i bits = _mm512_castps_si512(sums);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
  }

 private:
  static Lanes widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
};
