// Byte-shuffle tables shared by the vector vocabularies that have no compress instruction (AVX2, NEON).
//
// Row m serves the mask m of kLanes elements of W bytes. For kLanes = 4, W = 2 and m = 1010 (elements 1 and 3 are marked):
//
//   compress[m]   2 3 6 7 - - - -     packs:   dense  . b . d  ->  b d . .
//   expand[m]     - - 0 1 - - 2 3     spreads: values b d . .  ->  . b . d
//
// "-" is kAbsent. An index with its top bit set makes pshufb and tbl write zero, so lanes that are not marked expand to zero.
//
// kLanes  elements per shuffle: 8, 4 or 2, so that the table has 256, 16 or 4 rows
// W       element width in bytes
template <int kLanes, int W>
struct ShuffleTables {
  static constexpr uint8_t kAbsent = 0x80;

  alignas(64) uint8_t compress[1 << kLanes][kLanes * W];
  alignas(64) uint8_t expand[1 << kLanes][kLanes * W];

  constexpr ShuffleTables() : compress(), expand() {
    for (int mask = 0; mask < 1 << kLanes; ++mask) {
      int packed = 0;  // bytes marked so far
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool marked = (mask >> lane & 1) != 0;
        for (int byte = lane * W; byte < (lane + 1) * W; ++byte) {
          expand[mask][byte] = marked ? static_cast<uint8_t>(packed) : kAbsent;
          if (marked) compress[mask][packed++] = static_cast<uint8_t>(byte);
        }
      }
      while (packed < kLanes * W) compress[mask][packed++] = kAbsent;
    }
  }
};
