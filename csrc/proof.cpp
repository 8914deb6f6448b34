#include "proof.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace bitmask {
namespace {

// Tasks of whole rows: every row's popcount leads from its offset to the next. The lowest faulty row becomes the error, whatever the
// threads' order.
void prove_rows(Proof& proof) {
  const Geometry& g = proof.g;
  const uint8_t* const masks = proof.masks();
  const int64_t* const offsets = proof.offsets();
  const int64_t nnz = proof.nnz();
  std::vector<int64_t> faults(static_cast<size_t>(proof.tasks.count()), g.rows);
  for_each_task(proof.tasks.count(), proof.tasks.bytes(1), [&](int64_t index) {
    const Slice s = slice_of(proof.tasks, index, g);
    const int64_t next = s.task.row + s.task.rows;
    proof.starts[static_cast<size_t>(index)] = offsets[s.task.row];
    const int64_t faulty = cpu::kernels().first_faulty_row(masks + s.mask_byte, offsets + s.task.row, s.task.rows, g.cols,
                                                           next < g.rows ? offsets[next] : nnz, nnz);
    if (faulty < s.task.rows) faults[static_cast<size_t>(index)] = s.task.row + faulty;
  });
  if (g.rows > 0 && proof.starts[0] != 0) fail_row(masks, offsets, 0, g, nnz);
  for (const int64_t row : faults) {
    if (row < g.rows) fail_row(masks, offsets, row, g, nnz);
  }
  if (!std::is_sorted(proof.starts.begin(), proof.starts.end())) fail("row_offsets: changed while they were read");
}

// Tasks that are parts of a row: counted first, then each row's sum is held against the offsets.
void prove_long_rows(Proof& proof) {
  const Geometry& g = proof.g;
  const uint8_t* const masks = proof.masks();
  const int64_t* const offsets = proof.offsets();
  const int64_t nnz = proof.nnz();
  for_each_task(proof.tasks.count(), proof.tasks.bytes(1), [&](int64_t index) {
    const Slice s = slice_of(proof.tasks, index, g);
    proof.starts[static_cast<size_t>(index)] = cpu::kernels().count_bits(masks + s.mask_byte, bitmask_bytes(s.task.cols));
  });
  const int64_t padding = g.cols % 8;
  int64_t offset = 0;
  for (int64_t row = 0; row < g.rows; ++row) {
    const int64_t count = sum(&proof.starts[static_cast<size_t>(row * proof.tasks.parts_per_row())], proof.tasks.parts_per_row());
    const int64_t next = row + 1 < g.rows ? offsets[row + 1] : nnz;
    const uint8_t last_byte = masks[(row + 1) * bitmask_bytes(g.cols) - 1];
    if (offsets[row] != offset || next != offset + count || (padding != 0 && last_byte >> padding != 0)) {
      fail_row(masks, offsets, row, g, nnz);
    }
    offset += count;
  }
  exclusive_prefix_sums(proof.starts.data(), proof.tasks.count(), 0);
}

}  // namespace

// Dtypes and sizes first, then every row.
Proof prove(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, const std::vector<int64_t>& shape) {
  const Parts parts = parts_of(values, bitmasks, row_offsets, shape);
  const Tasks tasks(parts.geometry());
  Proof proof{parts, parts.geometry(), tasks, std::vector<int64_t>(static_cast<size_t>(tasks.count()) + 1)};
  proof.starts.back() = values.numel();
  tasks.whole_rows() ? prove_rows(proof) : prove_long_rows(proof);
  return proof;
}

}  // namespace bitmask
