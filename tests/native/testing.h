// What the native tests share: checks, random data, buffers that are watched, and the rules of the layout in their plainest form.
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace bitmask::testing {

using std::size_t;

// Whether AddressSanitizer is watching.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

// ---------------------------------------------------------------------------------------------------------------- checks

inline int64_t passed = 0, failed = 0;
inline std::string place;  // what is being tested: ISA, element kind, shape

__attribute__((format(printf, 2, 3))) inline void check(bool ok, const char* format, ...) {
  ok ? ++passed : ++failed;
  if (ok || failed > 50) return;
  std::printf("FAILED %s: ", place.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

// ---------------------------------------------------------------------------------------------------------------- data

inline uint64_t random_state = 0x9e3779b97f4a7c15;

inline uint64_t random_word() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1d;
}

inline int64_t random_below(int64_t bound) { return static_cast<int64_t>(random_word() % static_cast<uint64_t>(bound)); }

using Bytes = std::vector<uint8_t>;

// Distances from a cache-line boundary: on it, off every boundary, and on a boundary of half the vector only.
constexpr int kSkews[] = {0, 1, 32};

// Heap memory of exactly `size` bytes, `skew` bytes past a 64-byte boundary. Empty buffers have a null pointer, as empty tensors do.
class Buffer {
 public:
  static constexpr uint8_t kCanaryByte = 0xc5;  // before, behind, and inside until something is written there

  explicit Buffer(int64_t size, int skew = 0) : size_(static_cast<size_t>(size)), front_(kCanary + static_cast<size_t>(skew)) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, front_ + size_ + kCanary) != 0) std::abort();
    block_ = static_cast<uint8_t*>(block);
    std::memset(block_, kCanaryByte, front_ + size_ + kCanary);
  }
  explicit Buffer(const Bytes& bytes, int skew = 0) : Buffer(static_cast<int64_t>(bytes.size()), skew) {
    if (size_ != 0) std::memcpy(data(), bytes.data(), size_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(block_); }

  uint8_t* data() { return size_ == 0 ? nullptr : block_ + front_; }
  Bytes bytes() const { return Bytes(block_ + front_, block_ + front_ + size_); }
  bool canaries_intact() const {
    bool intact = true;
    for (size_t i = 0; i < front_; ++i) intact &= block_[i] == kCanaryByte;
    for (size_t i = front_ + size_; i < front_ + size_ + kCanary; ++i) intact &= block_[i] == kCanaryByte;
    return intact;
  }

 private:
  static constexpr size_t kCanary = kSanitized ? 0 : 128;  // the allocation's own red zones begin at once
  size_t size_, front_;
  uint8_t* block_;
};

// ---------------------------------------------------------------------------------------------------------------- layout

inline bool bit(const uint8_t* bits, int64_t index) { return (bits[index / 8] >> (index % 8) & 1) != 0; }

inline int64_t count_reference(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0;
  for (int64_t i = 0; i < bytes * 8; ++i) count += bit(bits, i);
  return count;
}

inline int64_t first_faulty_reference(const Bytes& bitmasks, const std::vector<int64_t>& row_offsets, int64_t rows, int64_t cols,
                                      int64_t end, int64_t nnz) {
  const int64_t row_bytes = (cols + 7) / 8;
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* bits = bitmasks.data() + row * row_bytes;
    const int64_t start = row_offsets[static_cast<size_t>(row)];
    const int64_t next = row + 1 < rows ? row_offsets[static_cast<size_t>(row + 1)] : end;
    const bool ordered = 0 <= start && start <= next && next <= nnz;
    if (!ordered || next - start != count_reference(bits, row_bytes)) return row;
    for (int64_t col = cols; col < row_bytes * 8; ++col) {
      if (bit(bits, col)) return row;
    }
  }
  return rows;
}

// ---------------------------------------------------------------------------------------------------------------- families

// Tests the linear kernels of every table that this machine can run (test_linear.cpp). `brief`: fewer shapes and numbers, for emulators.
void test_linear(bool brief);

// The same for the gradient of x (test_linear_gradient.cpp).
void test_linear_gradient(bool brief);

// The same for the block-sparse kernels (test_block.cpp).
void test_block(bool brief);

// The same for packing, unpacking and pruning of 2:4 (test_two_four_codec.cpp).
void test_two_four_codec(bool brief);

// The same for pruning to 2:4 in rows and columns (test_two_four_prune.cpp).
void test_two_four_prune(bool brief);

// The same for the 2:4 products (test_two_four_linear.cpp).
void test_two_four_linear(bool brief);

// The same for conversions to and from index lists (test_convert.cpp).
void test_convert(bool brief);

}  // namespace bitmask::testing
