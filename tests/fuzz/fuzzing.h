// What the fuzz targets share: reading their inputs, compressed parts that nothing is known of, and the kernel tables.
//
// Parts in an input, numbers least significant byte first:
//
//   0     rows (mod a number that the target says)  1, 2  columns (mod 321)
//   3, 4  number of values (mod rows * columns + 2)
//   5     flags: 1 derive the row offsets from the bitmasks   2 clear the padding bits   4 as many values as the bitmasks mark
//                the other bits are for the target
//   6     row offsets (8 bytes a row, absent with flag 1), bitmasks, values; missing bytes are made up
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace bitmask::fuzzing {

using std::size_t;

// Memory of exactly the size asked for that begins a cache line, as torch allocates it.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* items, size_t) { ::operator delete(items, kLine); }
  friend bool operator==(LineAllocator, LineAllocator) { return true; }
  friend bool operator!=(LineAllocator, LineAllocator) { return false; }
};

using Bytes = std::vector<uint8_t, LineAllocator<uint8_t>>;

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : static_cast<uint8_t>(++at_ * 37 | 1); }
  int64_t number(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= uint64_t{byte()} << (8 * i);
    return static_cast<int64_t>(value);
  }
  Bytes take(int64_t count) {
    Bytes bytes(static_cast<size_t>(count));
    for (uint8_t& value : bytes) value = byte();
    return bytes;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

struct Parts {
  int width;
  int64_t rows, cols, row_bytes, nnz;
  int flags;
  std::vector<int64_t> row_offsets;
  Bytes bitmasks, values;

  bool bit(int64_t row, int64_t col) const { return (bitmasks[static_cast<size_t>(row * row_bytes + col / 8)] >> (col % 8) & 1) != 0; }
};

inline Parts read_parts(Reader& reader, int width, int64_t rows_end) {
  Parts parts;
  parts.width = width;
  parts.rows = reader.byte() % rows_end;
  parts.cols = reader.number(2) % 321;
  parts.row_bytes = bitmask_bytes(parts.cols);
  parts.nnz = reader.number(2) % (parts.rows * parts.cols + 2);
  parts.flags = reader.byte();
  if ((parts.flags & 1) == 0) {
    for (int64_t row = 0; row < parts.rows; ++row) parts.row_offsets.push_back(reader.number(8));
  }
  parts.bitmasks = reader.take(parts.rows * parts.row_bytes);
  int64_t marked = 0;
  for (int64_t row = 0; row < parts.rows; ++row) {
    if ((parts.flags & 1) != 0) parts.row_offsets.push_back(marked);
    for (int64_t col = 0; col < parts.row_bytes * 8; ++col) {
      uint8_t& byte = parts.bitmasks[static_cast<size_t>(row * parts.row_bytes + col / 8)];
      if (col >= parts.cols && (parts.flags & 2) != 0) byte = static_cast<uint8_t>(byte & ~(1 << (col % 8)));
      marked += parts.bit(row, col);
    }
  }
  if ((parts.flags & 4) != 0) parts.nnz = marked;
  parts.values = reader.take(parts.nnz * parts.width);
  return parts;
}

// Whether the values of a row can be where the offsets say.
inline bool offsets_can_be(const Parts& parts, int64_t row) {
  const int64_t start = parts.row_offsets[static_cast<size_t>(row)];
  const int64_t stop = row + 1 < parts.rows ? parts.row_offsets[static_cast<size_t>(row + 1)] : parts.nnz;
  return start >= 0 && start <= stop && stop <= parts.nnz;
}

// The first row whose offsets cannot be, or as many as there are.
inline int64_t first_impossible_reference(const Parts& parts) {
  int64_t row = 0;
  while (row < parts.rows && offsets_can_be(parts, row)) ++row;
  return row;
}

// The first row of [begin, end) that breaks a rule of the layout, or `end`.
inline int64_t first_faulty_reference(const Parts& parts, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = parts.row_offsets[static_cast<size_t>(row)];
    const int64_t stop = row + 1 < parts.rows ? parts.row_offsets[static_cast<size_t>(row + 1)] : parts.nnz;
    if (!offsets_can_be(parts, row)) return row;
    int64_t marked = 0, padding = 0;
    for (int64_t col = 0; col < parts.row_bytes * 8; ++col) (col < parts.cols ? marked : padding) += parts.bit(row, col);
    if (padding != 0 || marked != stop - start) return row;
  }
  return end;
}

// The tables that this machine can run.
inline std::vector<const cpu::Kernels*> runnable_tables() {
  std::vector<const cpu::Kernels*> tables;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    cpu::force_isa(cpu::isa_name(i));
    tables.push_back(&cpu::kernels());
  }
  return tables;
}

}  // namespace bitmask::fuzzing
