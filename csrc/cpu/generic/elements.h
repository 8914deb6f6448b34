// Floating-point elements in software: widened to what sums are kept in, and narrowed again, rounded to nearest, ties to even. For the
// last few elements of a row, and for machines without conversion instructions. Included before simd_<isa>.h.

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

  // Adds half of the last kept bit, less one where that bit is 0, so that ties go to even, and cuts; a carry out of the mantissa is the
  // next exponent or infinity. A NaN is made quiet instead: the carry could take it past the largest exponent, cutting to infinity.
  static void narrow(Sum sum, uint8_t* dst) {
    const uint32_t bits = bits_as<uint32_t>(sum);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_as(static_cast<uint16_t>(sum != sum ? bits >> 16 | 0x40 : rounded), dst);
  }
};

struct Float16Element {
  using Sum = float;
  static constexpr int kWidth = 2;

  // Exponent and mantissa are moved into the places of an fp32, whose bias is larger by 112; an infinity or NaN is given the exponent of
  // ones. Subnormals go by way of an integer: as subnormals of fp32 they would be zeros in the processor's mode that flushes those.
  static Sum widen(const uint8_t* src) {
    const uint32_t bits = load_as<uint16_t>(src), magnitude = bits & 0x7fff;
    uint32_t wide = (magnitude << 13) + (112u << 23);
    if (magnitude < 0x400) wide = bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
    if (magnitude >= 0x7c00) wide |= 0x7f800000;
    return bits_as<float>(wide | (bits & 0x8000) << 16);
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
