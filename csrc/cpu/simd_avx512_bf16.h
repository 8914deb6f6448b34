// bf16 multiplied in pairs by AVX512_BF16: a lane is two columns, and one instruction adds both their products to an fp32 sum. It rounds
// once for each product and addition, to nearest even, and takes subnormals for zeros.
struct Bfloat16PairLanes : Float32Sums {
  using Element = Bfloat16Element;
  using Lanes = __m512i;
  static constexpr int kDepth = 2;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[2]) {
    const __m512i zero = opaque_zero();
    for (int vector = 0; vector < 2; ++vector) lanes[vector] = Simd::expand_vector<2>(zero, src, mask, vector);
    return src + __builtin_popcountll(mask) * 2;
  }

  static Lanes widen(const uint8_t* src) { return load(src); }
  static Lanes load(const uint8_t* src) { return _mm512_loadu_si512(src); }
  static void store(Lanes lanes, uint8_t* dst) { _mm512_storeu_si512(dst, lanes); }
  static Lanes pair(const uint8_t* even, const uint8_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static Lanes broadcast(const uint8_t* src) { return _mm512_set1_epi32(load_as<int32_t>(src)); }
  static Sums multiply_add(Lanes a, Lanes b, Sums sums) {
#if defined(__clang__)  // clang 16 crashes on the type that the intrinsic takes
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
#else
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  }

  static constexpr int kSelectedFrom = 4;
  using Columns = __m512i;
  static Columns load_columns(const uint8_t* src) { return _mm512_set1_epi64(load_as<int64_t>(src)); }
  static Lanes select(Columns columns, Selectors bytes) { return _mm512_shuffle_epi8(columns, bytes); }

  static void round(Sums sums, uint8_t* dst) { WidenedBfloat16Lanes::round(sums, dst); }
};
