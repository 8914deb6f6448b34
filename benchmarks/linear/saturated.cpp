// What dense weights can do at best: y = x W^T for one row x, at the pace at which memory delivers W; and that pace itself.
//
// A yardstick for the benchmarks, not part of the library. At this size a product is as fast as W is read, so all that matters is that
// nothing keeps memory waiting: each thread reads one contiguous run of rows from its first byte to its last and prefetches kAhead bytes
// in software, because the prefetchers of the hardware stop at the end of each page. Vectors are GCC's generic ones.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kAhead = 4096;
constexpr int64_t kLine = 64;
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
constexpr int kChains = 4;
constexpr int64_t kStep = kChains * kLanes;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <typename To, typename From>
To bits_of(const From* source) {
  To bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

Words wide_bits(const void* source) { return __builtin_convertvector(bits_of<Halves>(source), Words); }

// An element type: kLanes elements as floats, and a float as an element (to nearest; infinities and NaN do not come here).
struct Float32 {
  float bits;

  static Lanes widen(const Float32* source) { return bits_of<Lanes>(source); }
  static Float32 narrow(float value) { return {value}; }
};

struct Bfloat16 {
  uint16_t bits;

  static Lanes widen(const Bfloat16* source) { return reinterpret_cast<Lanes>(wide_bits(source) << 16); }
  static Bfloat16 narrow(float value) {
    const uint32_t bits = bits_of<uint32_t>(&value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

struct Float16 {
  Half bits;

#if defined(__AVX512F__)
  static Lanes widen(const Float16* source) { return reinterpret_cast<Lanes>(_mm512_cvtph_ps(bits_of<__m256i>(source))); }
#elif defined(__F16C__)
  static Lanes widen(const Float16* source) { return reinterpret_cast<Lanes>(_mm256_cvtph_ps(bits_of<__m128i>(source))); }
#else
  static Lanes widen(const Float16* source) {
    const Words bits = wide_bits(source);
    const Lanes magnitude = reinterpret_cast<Lanes>((bits & 0x7fff) << 13) * 0x1p112f;  // the exponents' biases differ by 112
    return reinterpret_cast<Lanes>(reinterpret_cast<Words>(magnitude) | (bits & 0x8000) << 16);
  }
#endif
  static Float16 narrow(float value) { return {static_cast<Half>(value)}; }
};

// The last elements of a row, with zeros behind them.
template <typename T>
Lanes widen_some(const T* source, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return T::widen(padded);
}

float sum(const Lanes& lanes) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

template <typename T>
void prefetch_step(const T* source) {
  const char* const ahead = reinterpret_cast<const char*>(source) + kAhead;
  for (int64_t byte = 0; byte < kStep * static_cast<int64_t>(sizeof(T)); byte += kLine) __builtin_prefetch(ahead + byte);
}

// One row of W with x, which is `k` floats and zeros up to a whole vector. There are several sums, because an addition takes cycles.
template <typename T>
float dot(const T* w, const float* x, int64_t k) {
  Lanes sums[kChains] = {};
  int64_t col = 0;
  for (; col + kStep <= k; col += kStep) {
    prefetch_step(w + col);
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = col + chain * kLanes;
      sums[chain] += T::widen(w + at) * bits_of<Lanes>(x + at);
    }
  }
  for (; col < k; col += kLanes) sums[0] += widen_some(w + col, std::min(kLanes, k - col)) * bits_of<Lanes>(x + col);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void linear(const void* x_data, const void* w_data, void* y_data, int64_t n, int64_t k, int threads) {
  const T *const x = static_cast<const T*>(x_data), *const w = static_cast<const T*>(w_data);
  T* const y = static_cast<T*>(y_data);
  std::vector<float> wide((k + kLanes - 1) / kLanes * kLanes);
  for (int64_t col = 0; col < k; col += kLanes) {
    const Lanes lanes = widen_some(x + col, std::min(kLanes, k - col));
    std::memcpy(&wide[col], &lanes, sizeof lanes);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < n; ++row) y[row] = T::narrow(dot(w + row * k, wide.data(), k));
}

}  // namespace

extern "C" {

// y [n] = x [k] times the transpose of w [n, k], on `threads` threads.
void linear_fp32(const void* x, const void* w, void* y, int64_t n, int64_t k, int threads) { linear<Float32>(x, w, y, n, k, threads); }
void linear_bf16(const void* x, const void* w, void* y, int64_t n, int64_t k, int threads) { linear<Bfloat16>(x, w, y, n, k, threads); }
void linear_fp16(const void* x, const void* w, void* y, int64_t n, int64_t k, int threads) { linear<Float16>(x, w, y, n, k, threads); }

// Reads `words` 64-bit words, a share of them with each thread, and returns their sum, so that no read can be left out.
uint64_t read_all(const uint64_t* source, int64_t words, int threads) {
  constexpr int64_t kBlock = 4096 / sizeof(uint64_t);
  uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (int64_t block = 0; block < words / kBlock; ++block) {
    const uint64_t* const from = source + block * kBlock;
    uint64_t sums[8] = {};
    for (int64_t word = 0; word < kBlock; word += 8) {
      __builtin_prefetch(reinterpret_cast<const char*>(from + word) + kAhead);
      for (int lane = 0; lane < 8; ++lane) sums[lane] += from[word + lane];
    }
    for (const uint64_t each : sums) total += each;
  }
  return total;
}
}  // extern "C"
