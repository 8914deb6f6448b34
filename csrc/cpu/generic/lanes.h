// How elements become the lanes that the linear and block-sparse kernels multiply: the parts common to all instruction sets, and a
// portable version in the compiler's own vector types, which any table uses for what its instruction set has nothing better for.

// The values behind a mask as a row of dense elements.
template <class Element>
struct DenseGroup {
  alignas(64) uint8_t bytes[kGroup * Element::kWidth];

  const uint8_t* expand(const uint8_t* src, uint64_t mask) { return Simd::template expand<Element::kWidth>(src, mask, bytes); }
};

// A type of lanes L holds, for one dtype:
//   L::Element          widen(bytes) and narrow(sum, bytes) of one element; Sum, the type it accumulates in
//   L::kDepth           columns in one lane: 1, or 2 where one instruction adds the products of a pair
//   L::kLanes           lanes of a vector, each sizeof(Sum) bytes
//   L::kPanelRows       rows of x whose sums fill the registers in multiply: kPanelRows * 2 accumulators and a few operands
//   L::kStreamedRows    the most rows of x that stream takes
//   L::kStreamSums      sums of products of rows of W and x that stream keeps side by side, to share what it loads of x
//   L::kMicroRows, kMicroVectors   sums that fill the registers in the block-sparse products (block_tiles.h)
//   L::Lanes, L::Sums   vectors of lanes and of sums
//   L::expand(src, mask, lanes)    the group of 64 columns that `mask` spreads out of the packed elements at src -> src past those taken;
//                                  may read 64 elements
//   L::widen(src)                  kLanes * kDepth elements, as lanes
//   L::pair(even, odd)             where kDepth is 2: kLanes elements of two rows, a lane holding one of each
//   L::load, store, broadcast      lanes in memory
//   L::multiply_add(a, b, sums)    sums + a * b, lane by lane
//   L::zero, add, reduce, load_sums, store_sums
//   L::round(sums, dst)            kLanes elements, rounded to nearest, ties to even
//   L::transpose(src, stride, dst) kLanes x kLanes lanes; rows of src are `stride` bytes apart
//   L::kSelectedFrom    how many columns a lane can be selected from by one shuffle, 0 if none (two_four_multiply.h):
//   L::load_columns(src)           so many columns, each lane being given them all
//   L::load_selectors, select(columns, selectors)
//   L::look_up(table, nibbles)     32 bits for the lowest four of each lane
template <class ElementType>
struct PortableLanes {
  using Element = ElementType;
  using Sum = typename Element::Sum;
  static constexpr int kDepth = 1;
  static constexpr int kLanes = 16 / sizeof(Sum);
  static constexpr int kPanelRows = 6;
  static constexpr int kStreamedRows = 4;
  static constexpr int kStreamSums = 4;
  static constexpr int kMicroRows = 4;
  static constexpr int kMicroVectors = 2;
  static constexpr int kSelectedFrom = 0;
  static constexpr int kVectors = kGroup / kLanes;
  typedef Sum Sums __attribute__((vector_size(16)));
  using Lanes = Sums;

  static const uint8_t* expand(const uint8_t* src, uint64_t mask, Lanes (&lanes)[kVectors]) {
    DenseGroup<Element> dense;
    src = dense.expand(src, mask);
    for (int vector = 0; vector < kVectors; ++vector) lanes[vector] = widen(dense.bytes + vector * kLanes * Element::kWidth);
    return src;
  }

  static Lanes widen(const uint8_t* src) {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = Element::widen(src + i * Element::kWidth);
    return lanes;
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
