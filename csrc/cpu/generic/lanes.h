// How elements become the lanes that linear.h multiplies: the parts common to all instruction sets, and a portable version in the
// compiler's own vector types, which any table uses for what its instruction set has nothing better for.
//
// A type of lanes L holds, for one dtype:
//   L::Element          widen(bytes) and narrow(sum, bytes) of one element; Sum, the type it accumulates in
//   L::kDepth           columns in one lane: 1, or 2 where one instruction adds the products of a pair
//   L::kLanes           lanes of a vector, each sizeof(Sum) bytes
//   L::kPanelRows       rows of x whose sums fill the registers in multiply: kPanelRows * 2 accumulators and a few operands
//   L::Lanes, L::Sums   vectors of lanes and of sums
//   L::expand(src, mask, lanes)    the group of 64 columns that `mask` spreads out of the packed elements at src -> src past those taken;
//                                  may read 64 elements
//   L::load, store, broadcast      lanes in memory
//   L::multiply_add(a, b, sums)    sums + a * b, lane by lane
//   L::zero, add, reduce, load_sums, store_sums
//   L::round(sums, dst)            kLanes elements, rounded to nearest, ties to even
//   L::transpose(src, stride, dst) kLanes x kLanes lanes; rows of src are `stride` bytes apart

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline T load_as(const uint8_t* src) {
  T value;
  __builtin_memcpy(&value, src, sizeof(value));
  return value;
}

template <class T>
inline void store_as(T value, uint8_t* dst) {
  __builtin_memcpy(dst, &value, sizeof(value));
}

// Elements in software: for the last few, and for machines without conversion instructions.

struct Float32Element {
  using Sum = float;
  static constexpr int kWidth = 4;
  static Sum widen(const uint8_t* src) { return load_as<float>(src); }
  static void narrow(Sum sum, uint8_t* dst) { store_as(sum, dst); }
};

struct Float64Element {
  using Sum = double;
  static constexpr int kWidth = 8;
  static Sum widen(const uint8_t* src) { return load_as<double>(src); }
  static void narrow(Sum sum, uint8_t* dst) { store_as(sum, dst); }
};

struct Bfloat16Element {
  using Sum = float;
  static constexpr int kWidth = 2;
  static Sum widen(const uint8_t* src) { return bits_as<float>(static_cast<uint32_t>(load_as<uint16_t>(src)) << 16); }
  static void narrow(Sum sum, uint8_t* dst) {
    const uint32_t bits = bits_as<uint32_t>(sum);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_as(static_cast<uint16_t>(sum != sum ? bits >> 16 | 0x40 : rounded), dst);
  }
};

struct Float16Element {
  using Sum = float;
  static constexpr int kWidth = 2;

  // Exponent and mantissa are moved into the places of an fp32 and scaled by the difference of the biases, 2^112, which also normalises
  // subnormals; an infinity or NaN then lies at 2^16 and above and is given the exponent of ones.
  static Sum widen(const uint8_t* src) {
    const uint32_t bits = load_as<uint16_t>(src);
    uint32_t magnitude = bits_as<uint32_t>(bits_as<float>((bits & 0x7fff) << 13) * 0x1p112f);
    if (magnitude >= 0x47800000) magnitude |= 0x7f800000;
    return bits_as<float>(magnitude | (bits & 0x8000) << 16);
  }

  static void narrow(Sum sum, uint8_t* dst) {
    const uint32_t bits = bits_as<uint32_t>(sum);
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00 | (magnitude >> 13 & 0x1ff);  // NaN, made quiet
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000) {
      // Subnormal: adding 0.5 leaves the wanted bits, rounded, at the end of the mantissa.
      half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    }
    store_as(static_cast<uint16_t>(half | (bits >> 16 & 0x8000)), dst);
  }
};

// The values behind a mask as a row of dense elements.
template <class Element>
struct DenseGroup {
  alignas(64) uint8_t bytes[kGroup * Element::kWidth];

  const uint8_t* expand(const uint8_t* src, uint64_t mask) { return Simd::template expand<Element::kWidth>(src, mask, bytes); }
};

template <class ElementType>
struct PortableLanes {
  using Element = ElementType;
  using Sum = typename Element::Sum;
  static constexpr int kDepth = 1;
  static constexpr int kLanes = 16 / sizeof(Sum);
  static constexpr int kPanelRows = 6;
  static constexpr int kVectors = kGroup / kLanes;
  typedef Sum Sums __attribute__((vector_size(16)));
  using Lanes = Sums;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[kVectors]) {
    DenseGroup<Element> dense;
    src = dense.expand(src, mask);
    for (int i = 0; i < kGroup; ++i) lanes[i / kLanes][i % kLanes] = Element::widen(dense.bytes + i * Element::kWidth);
    return src;
  }

  static Lanes load(const uint8_t* src) { return load_as<Lanes>(src); }
  static void store(Lanes lanes, uint8_t* dst) { store_as(lanes, dst); }
  static Lanes broadcast(const uint8_t* src) {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = load_as<Sum>(src);
    return lanes;
  }
  static Sums multiply_add(Lanes a, Lanes b, Sums sums) { return sums + a * b; }
  static Sums zero() { return Sums{}; }
  static Sums add(Sums a, Sums b) { return a + b; }
  static Sums load_sums(const uint8_t* src) { return load_as<Sums>(src); }
  static void store_sums(Sums sums, uint8_t* dst) { store_as(sums, dst); }

  static Sum reduce(Sums sums) {
    Sum total = 0;
    for (int i = 0; i < kLanes; ++i) total += sums[i];
    return total;
  }

  static void round(Sums sums, uint8_t* dst) {
    for (int i = 0; i < kLanes; ++i) Element::narrow(sums[i], dst + i * Element::kWidth);
  }

  static void transpose(const uint8_t* src, int64_t stride, uint8_t* dst) {
    for (int row = 0; row < kLanes; ++row) {
      for (int lane = 0; lane < kLanes; ++lane) {
        store_as(load_as<Sum>(src + row * stride + lane * sizeof(Sum)), dst + (lane * kLanes + row) * sizeof(Sum));
      }
    }
  }
};
