// The kernels' vector vocabulary for AArch64 NEON.
//
// NEON has neither a move-mask nor a compress instruction. A mask word is made by giving each element's byte the weight of its bit and
// adding neighbours up; elements are packed and spread by TBL with the indices of tables.h, one 16-byte vector (8 bytes for W = 1) at a
// time. Stores are whole vectors: the excess of one is overwritten by the next. SVE's COMPACT knows 32- and 64-bit elements only.
//
// Included after tables.h, like it inside an anonymous namespace.
struct Simd {
  template <int W>
  static uint64_t nonzero(const uint8_t* src, const ZeroTest& test) {
    const uint8x16_t tested = vld1q_u8(test.bytes);
    return mask_word(marks<W, 16>(src, tested), marks<W, 16>(src + 16 * W, tested), marks<W, 16>(src + 32 * W, tested),
                     marks<W, 16>(src + 48 * W, tested));
  }

  template <int W>
  static uint8_t* compress(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const uint64_t counts = field_counts<kLanes<W>>(mask);
    for (int lane = 0; lane < kGroup; lane += kLanes<W>) {
      store_low<kLanes<W> * W>(dst, pack_lanes<W>(load_low<kLanes<W> * W>(src + lane * W), field_at<W>(mask, lane)));
      dst += field_at<W>(counts, lane) * W;
    }
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const uint64_t counts = field_counts<kLanes<W>>(mask);
    for (int lane = 0; lane < kGroup; lane += kLanes<W>) {
      store_low<kLanes<W> * W>(dst + lane * W, spread_lanes<W>(load_low<kLanes<W> * W>(src), field_at<W>(mask, lane)));
      src += field_at<W>(counts, lane) * W;
    }
    return src;
  }

  // Four elements of 8 bytes are two vectors, the two of them that are stored are one.
  template <int W>
  static void compress_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    if constexpr (W == 8) {
      for (int lane = 0; lane < kGroup; lane += 4) {
        const uint8x16x2_t four = {{vld1q_u8(src + lane * 8), vld1q_u8(src + lane * 8 + 16)}};
        vst1q_u8(dst + lane * 4, vqtbl2q_u8(four, vld1q_u8(kFourPairs.compress[mask >> lane & 15])));
      }
    } else {
      for (int lane = 0; lane < kGroup; lane += kLanes<W>) {
        const uint8x16_t packed = pack_lanes<W>(load_low<kLanes<W> * W>(src + lane * W), field_at<W>(mask, lane));
        store_low<kLanes<W> * W / 2>(dst + lane / 2 * W, packed);
      }
    }
  }

  template <int W>
  static void expand_pairs(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    if constexpr (W == 8) {
      for (int lane = 0; lane < kGroup; lane += 4) {
        const uint8x16_t pair = vld1q_u8(src + lane * 4);
        const uint8_t* const indices = kFourPairs.expand[mask >> lane & 15];
        vst1q_u8(dst + lane * 8, vqtbl1q_u8(pair, vld1q_u8(indices)));
        vst1q_u8(dst + lane * 8 + 16, vqtbl1q_u8(pair, vld1q_u8(indices + 16)));
      }
    } else {
      for (int lane = 0; lane < kGroup; lane += kLanes<W>) {
        const uint8x16_t packed = load_low<kLanes<W> * W / 2>(src + lane / 2 * W);
        store_low<kLanes<W> * W>(dst + lane * W, spread_lanes<W>(packed, field_at<W>(mask, lane)));
      }
    }
  }

  template <int W>
  static constexpr int kFoursBytes = W == 8 ? 32 : 16;

  template <int W, int A, int B, int C, int D, class Vector>
  static Vector permute_fours(Vector lanes) {
    if constexpr (W == 8) {
      return Vector{lanes[A], lanes[B], lanes[C], lanes[D]};
    } else {
      static constexpr FoursOrder<W> kOrder(A, B, C, D);
      return reinterpret_cast<Vector>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(lanes), vld1q_u8(kOrder.indices)));
    }
  }

  template <int W, class Vector>
  static uint64_t at_least(Vector a, Vector b) {
    if constexpr (W == 1) {
      const uint8x16_t weights = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
      const uint8x16_t bits = vandq_u8(vcgeq_s8(reinterpret_cast<int8x16_t>(a), reinterpret_cast<int8x16_t>(b)), weights);
      return vaddv_u8(vget_low_u8(bits)) | uint64_t{vaddv_u8(vget_high_u8(bits))} << 8;
    } else if constexpr (W == 2) {
      const uint8x8_t marked = vmovn_u16(vcgeq_s16(reinterpret_cast<int16x8_t>(a), reinterpret_cast<int16x8_t>(b)));
      return vaddv_u8(vand_u8(marked, vreinterpret_u8_u64(vdup_n_u64(0x8040201008040201))));
    } else if constexpr (W == 8) {
      uint64_t mask = 0;
      for (int lane = 0; lane < 4; ++lane) mask |= uint64_t{a[lane] >= b[lane]} << lane;
      return mask;
    } else {
      const uint16x4_t marked = vmovn_u32(vcgeq_s32(reinterpret_cast<int32x4_t>(a), reinterpret_cast<int32x4_t>(b)));
      return vaddv_u16(vand_u16(marked, vreinterpret_u16_u64(vdup_n_u64(0x0008000400020001))));
    }
  }

  // A byte of the mask at a time: its row of the table is the positions, and what marks absent ones is overwritten by the next byte's.
  static int64_t* list(uint64_t mask, int64_t first, int64_t* dst) {
    const uint64_t counts = field_counts<8>(mask);
    for (int at = 0; at < kGroup; at += 8) {
      const uint16x8_t positions = vmovl_u8(vld1_u8(kTables<1>.compress[field_at<1>(mask, at)]));
      const uint32x4_t halves[2] = {vmovl_u16(vget_low_u16(positions)), vmovl_u16(vget_high_u16(positions))};
      const uint64x2_t base = vdupq_n_u64(static_cast<uint64_t>(first + at));
      uint64_t* const to = reinterpret_cast<uint64_t*>(dst);
      for (int half = 0; half < 2; ++half) {
        vst1q_u64(to + 4 * half, vaddw_u32(base, vget_low_u32(halves[half])));
        vst1q_u64(to + 4 * half + 2, vaddw_u32(base, vget_high_u32(halves[half])));
      }
      dst += field_at<1>(counts, at);
    }
    return dst;
  }

 private:
  // Elements of W bytes that one shuffle takes; as many bits of the mask word are its field. 8 at most, so that a table has 256 rows.
  template <int W>
  static constexpr int kLanes = W == 1 ? 8 : 16 / W;

  template <int W>
  static constexpr ShuffleTables<kLanes<W>, W> kTables{};
  static constexpr ShuffleTables<4, 8> kFourPairs{};

  // Byte indices that bring elements of W bytes into another order, in each four of a vector.
  template <int W>
  struct FoursOrder {
    uint8_t indices[16];

    constexpr FoursOrder(int a, int b, int c, int d) : indices() {
      const int order[] = {a, b, c, d};
      for (int i = 0; i < 16; ++i) indices[i] = static_cast<uint8_t>((i / W / 4 * 4 + order[i / W % 4]) * W + i % W);
    }
  };

  // The field of `word` that starts at bit `lane`.
  template <int W>
  static uint64_t field_at(uint64_t word, int lane) {
    constexpr int kBits = kLanes<W>;
    return word >> lane & ((uint64_t{1} << kBits) - 1);
  }

  // Set bits of each field of kBits = 1, 2, 4 or 8 bits, in that field.
  template <int kBits>
  static uint64_t field_counts(uint64_t mask) {
    if (kBits >= 2) mask = mask - (mask >> 1 & 0x5555555555555555);
    if (kBits >= 4) mask = (mask & 0x3333333333333333) + (mask >> 2 & 0x3333333333333333);
    if (kBits >= 8) mask = (mask + (mask >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return mask;
  }

  // The first kSize bytes of a vector; those that are not loaded are undefined.
  template <int kSize>
  static uint8x16_t load_low(const uint8_t* src) {
    if constexpr (kSize == 16) return vld1q_u8(src);
    if constexpr (kSize == 8) return vcombine_u8(vld1_u8(src), vdup_n_u8(0));
    if constexpr (kSize == 4) return vreinterpretq_u8_u32(vdupq_n_u32(load_as<uint32_t>(src)));
  }
  template <int kSize>
  static void store_low(uint8_t* dst, uint8x16_t v) {
    if constexpr (kSize == 16) vst1q_u8(dst, v);
    if constexpr (kSize == 8) vst1_u8(dst, vget_low_u8(v));
    if constexpr (kSize == 4) store_as(vgetq_lane_u32(vreinterpretq_u32_u8(v), 0), dst);
  }

  // The marked lanes of a vector, packed. A table's index of an absent lane is out of range, which TBL makes zero.
  template <int W>
  static uint8x16_t pack_lanes(uint8x16_t v, uint64_t field) {
    if constexpr (W == 16) return v;
    if constexpr (W != 16) return vqtbl1q_u8(v, load_low<kLanes<W> * W>(kTables<W>.compress[field]));
  }

  // The first elements of a vector in the marked lanes, zero in the others.
  template <int W>
  static uint8x16_t spread_lanes(uint8x16_t v, uint64_t field) {
    if constexpr (W == 16) return vandq_u8(v, vreinterpretq_u8_u64(vdupq_n_u64(0 - field)));
    if constexpr (W != 16) return vqtbl1q_u8(v, load_low<kLanes<W> * W>(kTables<W>.expand[field]));
  }

  // One mark, all ones or all zeros, for each of the kMarks elements at `src`: marks are 16 / kMarks bytes wide and fill a vector. Full
  // width comes from the test itself; each storey above keeps the even halves of the marks below.
  template <int W, int kMarks>
  static uint8x16_t marks(const uint8_t* src, uint8x16_t tested) {
    if constexpr (kMarks == 16 / W) {
      return test_lanes<W>(vld1q_u8(src), tested);
    } else {
      const uint8x16_t low = marks<W, kMarks / 2>(src, tested);
      const uint8x16_t high = marks<W, kMarks / 2>(src + kMarks / 2 * W, tested);
      return even_parts<16 / kMarks>(low, high);
    }
  }

  // All ones in the lanes of W bytes that have a tested bit set.
  template <int W>
  static uint8x16_t test_lanes(uint8x16_t elements, uint8x16_t tested) {
    if constexpr (W == 1) {
      return vtstq_u8(elements, tested);
    } else if constexpr (W == 2) {
      return vreinterpretq_u8_u16(vtstq_u16(vreinterpretq_u16_u8(elements), vreinterpretq_u16_u8(tested)));
    } else if constexpr (W == 4) {
      return vreinterpretq_u8_u32(vtstq_u32(vreinterpretq_u32_u8(elements), vreinterpretq_u32_u8(tested)));
    } else {
      const uint8x16_t halves = vreinterpretq_u8_u64(vtstq_u64(vreinterpretq_u64_u8(elements), vreinterpretq_u64_u8(tested)));
      return W == 8 ? halves : vorrq_u8(halves, vextq_u8(halves, halves, 8));
    }
  }

  // The even-numbered parts of kBytes = 1, 2, 4 or 8 bytes of both vectors.
  template <int kBytes>
  static uint8x16_t even_parts(uint8x16_t low, uint8x16_t high) {
    if constexpr (kBytes == 1) {
      return vuzp1q_u8(low, high);
    } else if constexpr (kBytes == 2) {
      return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high)));
    } else if constexpr (kBytes == 4) {
      return vreinterpretq_u8_u32(vuzp1q_u32(vreinterpretq_u32_u8(low), vreinterpretq_u32_u8(high)));
    } else {
      return vreinterpretq_u8_u64(vuzp1q_u64(vreinterpretq_u64_u8(low), vreinterpretq_u64_u8(high)));
    }
  }

  // The mask word of 64 byte marks: byte i is weighted with bit i % 8, and three rounds of adding neighbours join eight of them.
  static uint64_t mask_word(uint8x16_t marks0, uint8x16_t marks1, uint8x16_t marks2, uint8x16_t marks3) {
    const uint8x16_t weights = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t low = vpaddq_u8(vandq_u8(marks0, weights), vandq_u8(marks1, weights));
    const uint8x16_t high = vpaddq_u8(vandq_u8(marks2, weights), vandq_u8(marks3, weights));
    const uint8x16_t nibbles = vpaddq_u8(low, high);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(nibbles, nibbles)), 0);
  }
};

// ---- Lanes of the linear kernels (generic/lanes.h says what they hold): four columns a vector, multiplied in fp32

struct Float32Operands {
  using Sum = float;
  using Sums = float32x4_t;
  using Lanes = float32x4_t;
  static constexpr int kDepth = 1;
  static constexpr int kLanes = 4;
  static constexpr int kPanelRows = 12;
  static constexpr int kStreamedRows = 4;
  static constexpr int kStreamSums = 4;
  static constexpr int kMicroRows = 8;
  static constexpr int kMicroVectors = 2;
  static constexpr int kSelectedFrom = 0;  // a shuffle for each product costs what is saved

  static Lanes load(const uint8_t* src) { return vreinterpretq_f32_u8(vld1q_u8(src)); }
  static void store(Lanes lanes, uint8_t* dst) { vst1q_u8(dst, vreinterpretq_u8_f32(lanes)); }
  static Lanes broadcast(const uint8_t* src) { return vdupq_n_f32(load_as<float>(src)); }
  static Sums multiply_add(Lanes a, Lanes b, Sums sums) { return vfmaq_f32(sums, a, b); }
  static Sums zero() { return vdupq_n_f32(0); }
  static Sums add(Sums a, Sums b) { return vaddq_f32(a, b); }
  static Sum reduce(Sums sums) { return vaddvq_f32(sums); }
  static Sums load_sums(const uint8_t* src) { return load(src); }
  static void store_sums(Sums sums, uint8_t* dst) { store(sums, dst); }

  static void transpose(const uint8_t* src, int64_t stride, uint8_t* dst) {
    const float32x4x2_t low = vtrnq_f32(load(src), load(src + stride));
    const float32x4x2_t high = vtrnq_f32(load(src + 2 * stride), load(src + 3 * stride));
    for (int lane = 0; lane < 2; ++lane) {
      store(vcombine_f32(vget_low_f32(low.val[lane]), vget_low_f32(high.val[lane])), dst + lane * 16);
      store(vcombine_f32(vget_high_f32(low.val[lane]), vget_high_f32(high.val[lane])), dst + (lane + 2) * 16);
    }
  }
};

struct Float32Lanes : Float32Operands {
  using Element = Float32Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[16]) {
    uint8_t dense[kGroup * 4];
    src = Simd::expand<4>(src, mask, dense);
    for (int vector = 0; vector < 16; ++vector) lanes[vector] = load(dense + vector * 16);
    return src;
  }
  static Lanes widen(const uint8_t* src) { return load(src); }
  static void round(Sums sums, uint8_t* dst) { store(sums, dst); }
};

struct Float16Lanes : Float32Operands {
  using Element = Float16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[16]) {
    uint8_t dense[kGroup * 2];
    src = Simd::expand<2>(src, mask, dense);
    for (int vector = 0; vector < 16; ++vector) lanes[vector] = widen(dense + vector * 8);
    return src;
  }
  static Lanes widen(const uint8_t* src) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(src))); }
  static void round(Sums sums, uint8_t* dst) { vst1_u8(dst, vreinterpret_u8_f16(vcvt_f16_f32(sums))); }
};

struct Bfloat16Lanes : Float32Operands {
  using Element = Bfloat16Element;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[16]) {
    uint8_t dense[kGroup * 2];
    src = Simd::expand<2>(src, mask, dense);
    for (int vector = 0; vector < 16; ++vector) lanes[vector] = widen(dense + vector * 8);
    return src;
  }
  static Lanes widen(const uint8_t* src) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(src)), 16)); }

  // Bfloat16Element::narrow in each lane.
  static void round(Sums sums, uint8_t* dst) {
    const uint32x4_t bits = vreinterpretq_u32_f32(sums);
    const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), last);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t number = vceqq_f32(sums, sums);
    vst1_u8(dst, vreinterpret_u8_u16(vshrn_n_u32(vbslq_u32(number, rounded, quiet), 16)));
  }
};
