// The kernels' vector vocabulary for AVX-512 F+BW+VL+VBMI2: one compress or expand instruction a vector.
//
// Compressed vectors are stored whole and overlap: a compressing store to memory is microcode on Zen 4, and a masked one is slower than
// the bytes it saves. Zero-masked compress and expand wait for the old value of their destination on Zen 4 and 5, so both merge into a
// zero that the compiler cannot recognise.
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
    for (int vector = 0; vector < W; ++vector) {
      const uint64_t lanes = lanes_of<W>(mask, vector);
      const __m512i dense = expand_lanes<W>(zero, lanes, load(src));
      _mm512_storeu_si512(dst + vector * 64, dense);
      src += __builtin_popcountll(lanes) * W;
    }
    return src;
  }

 private:
  static __m512i load(const uint8_t* src) { return _mm512_loadu_si512(src); }

  static __m512i opaque_zero() {
    __m512i zero = _mm512_setzero_si512();
    asm volatile("" : "+v"(zero));
    return zero;
  }

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
