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
      pack_vector<W>(src + lane * W, field_at<W>(mask, lane), dst);
      dst += field_at<W>(counts, lane) * W;
    }
    return dst;
  }

  template <int W>
  static const uint8_t* expand(const uint8_t* src, uint64_t mask, uint8_t* dst) {
    const uint64_t counts = field_counts<kLanes<W>>(mask);
    for (int lane = 0; lane < kGroup; lane += kLanes<W>) {
      spread_vector<W>(src, field_at<W>(mask, lane), dst + lane * W);
      src += field_at<W>(counts, lane) * W;
    }
    return src;
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

  // Stores the marked lanes of the vector at `src`, packed; what follows them in the vector is undefined.
  template <int W>
  static void pack_vector(const uint8_t* src, uint64_t field, uint8_t* dst) {
    if constexpr (W == 16) {
      vst1q_u8(dst, vld1q_u8(src));
    } else {
      shuffle<kLanes<W> * W>(src, kTables<W>.compress[field], dst);
    }
  }

  // Stores a vector whose marked lanes are the first elements at `src`, in order, and whose other lanes are zero.
  template <int W>
  static void spread_vector(const uint8_t* src, uint64_t field, uint8_t* dst) {
    if constexpr (W == 16) {
      vst1q_u8(dst, vandq_u8(vld1q_u8(src), vreinterpretq_u8_u64(vdupq_n_u64(0 - field))));
    } else {
      shuffle<kLanes<W> * W>(src, kTables<W>.expand[field], dst);
    }
  }

  // dst[i] = src[indices[i]] for kBytes = 8 or 16 bytes, zero where the index is out of range.
  template <int kBytes>
  static void shuffle(const uint8_t* src, const uint8_t* indices, uint8_t* dst) {
    if constexpr (kBytes == 8) {
      vst1_u8(dst, vtbl1_u8(vld1_u8(src), vld1_u8(indices)));
    } else {
      vst1q_u8(dst, vqtbl1q_u8(vld1q_u8(src), vld1q_u8(indices)));
    }
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
