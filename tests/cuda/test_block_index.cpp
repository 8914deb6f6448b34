// Tests the proofs of an index of blocks, and the schedule of its lines, against loops over the same index.
#include <numeric>
#include <set>

#include "block_problems.h"

namespace bitmask::testing {
namespace {

constexpr cuda::Fault kUnknown = 0x0123456789abcdef;  // what memory holds before it is written

// Blocks at random places of a grid: about as many as `density` says in each line, or in every fourth line alone.
IndexParts random_index(int64_t lines, int64_t limit, double density, bool skewed) {
  std::vector<bool> kept(static_cast<size_t>(lines * limit));
  for (int64_t i = 0; i < lines * limit; ++i) {
    const double share = skewed && i / limit % 4 != 0 ? 0 : density;
    kept[static_cast<size_t>(i)] = static_cast<double>(random_below(1 << 20)) < share * (1 << 20);
  }
  return index_parts(kept, lines, limit);
}

void set_place(const char* what, const IndexParts& index) {
  place = std::string(what) + " of " + std::to_string(index.lines()) + " lines, " + std::to_string(index.blocks()) + " blocks, limit " +
          std::to_string(index.limit);
}

// The lowest faulty line; the order is nothing to it.
cuda::Fault fault_of(IndexParts index) {
  index.order.clear();
  for (int64_t line = 0; line < index.lines(); ++line) {
    if (!read_line(index, line)) return static_cast<cuda::Fault>(line);
  }
  return index.lines() == 0 && index.blocks() > 0 ? 0 : cuda::kNoFault;
}

// What a proof makes of an index: its fault, and the line of each block.
struct Proven {
  cuda::Fault fault;
  Bytes lines;
};

Proven prove(const IndexParts& parts, bool with_lines) {
  StoredIndex stored(parts);
  Buffer lines(parts.blocks() * 8);
  cuda::Fault fault = kUnknown;
  const cudaError_t error =
      cuda::prove_block_index(stored.index, with_lines ? reinterpret_cast<int64_t*>(lines.data()) : nullptr, &fault, nullptr);
  check(error == cudaSuccess, "returns %d", static_cast<int>(error));
  check(lines.canaries_intact(), "writes outside of the lines");
  return {fault, lines.bytes()};
}

void test_proof(const IndexParts& index) {
  set_place("proof", index);
  const Proven proven = prove(index, true);
  const cuda::Fault expected = fault_of(index);
  check(proven.fault == expected, "fault %llx instead of %llx", proven.fault, expected);
  if (expected == cuda::kNoFault) check(proven.lines == bytes_of(lines_of(index)), "wrong lines");
  for (size_t i = 0; i < proven.lines.size(); i += 8) {
    int64_t line;
    std::memcpy(&line, proven.lines.data() + i, 8);
    check(line >= 0 && (line < index.lines() || line == 0), "block %zu in line %" PRId64, i / 8, line);
  }
  check(prove(index, false).fault == expected, "other fault without lines");
}

void test_sound_and_mutated(int64_t lines, int64_t limit, double density, bool skewed) {
  const IndexParts sound = random_index(lines, limit, density, skewed);
  check(fault_of(sound) == cuda::kNoFault, "the test's own index is faulty");
  test_proof(sound);
  for (int changes = 1; changes <= 3; ++changes) {
    IndexParts mutated = sound;
    for (int i = 0; i < changes; ++i) mutate(mutated);
    test_proof(mutated);
  }
}

void test_proofs() {
  for (const int64_t lines : {0, 1, 2, 31, 257, 700}) {
    for (const int64_t limit : {0, 1, 5, 40}) {
      test_sound_and_mutated(lines, limit, 0.4, false);
      test_sound_and_mutated(lines, limit, 1, true);
    }
  }
  for (int i = 0; i < 150; ++i) test_sound_and_mutated(1 + random_below(6), 1 + random_below(6), 0.5, i % 2 == 0);
  test_proof({{0}, {0, 1, 2}, {}, 5});                 // blocks of no line
  test_proof({{0, 2, 0, 4, 4}, {3, 3, 0, 1}, {}, 5});  // a search that goes by all starts misses line 0
  test_proof({{0, 1, 0, 2}, {3, 2}, {}, 5});           // faulty starts, then a line whose positions descend
}

// Whether the order says where the blocks lie row by row, all of the index being sound otherwise.
bool is_row_by_row(const IndexParts& by_column) {
  const std::vector<int64_t> lines = lines_of(by_column);
  std::vector<size_t> at(lines.size());
  std::iota(at.begin(), at.end(), size_t{0});
  std::sort(at.begin(), at.end(), [&](size_t a, size_t b) {
    return std::make_pair(by_column.positions[a], lines[a]) < std::make_pair(by_column.positions[b], lines[b]);
  });
  for (size_t place = 0; place < at.size(); ++place) {
    if (by_column.order[at[place]] != static_cast<int64_t>(place)) return false;
  }
  return true;
}

void test_order(const IndexParts& by_column) {
  set_place("order", by_column);
  StoredIndex stored(by_column);
  const Proven proven = prove(by_column, true);
  Buffer lines(proven.lines), workspace(by_column.blocks() * 8);
  cuda::Fault fault = proven.fault;
  const cudaError_t error =
      cuda::prove_block_order(stored.index, reinterpret_cast<const int64_t*>(lines.data()), &fault, workspace.data(), nullptr);
  check(error == cudaSuccess && workspace.canaries_intact(), "returns %d, or writes outside", static_cast<int>(error));
  check(fault <= proven.fault, "raises the fault");
  if (proven.fault != cuda::kNoFault) return;
  check((fault == cuda::kNoFault) == is_row_by_row(by_column), "fault %llx, yet the order is %s", fault,
        is_row_by_row(by_column) ? "right" : "wrong");
  check(fault == cuda::kNoFault || fault < static_cast<cuda::Fault>(by_column.lines()), "fault %llx is no line", fault);
}

// Changes the order alone: swaps, repeats, goes out of range.
void mutate_order(IndexParts& index) {
  if (index.order.empty()) return;
  const auto any = [&]() -> int64_t& { return index.order[static_cast<size_t>(random_below(index.blocks()))]; };
  const int64_t odd[] = {-1, index.blocks(), INT64_MIN, INT64_MAX};
  switch (random_below(3)) {
    case 0:
      std::swap(any(), any());
      break;
    case 1:
      any() = any();
      break;
    default:
      any() = odd[random_below(std::size(odd))];
  }
}

void test_orders() {
  for (int i = 0; i < 120; ++i) {
    const IndexParts sound = transpose(random_index(1 + random_below(i < 6 ? 60 : 7), 1 + random_below(i < 6 ? 60 : 7), 0.5, i % 3 == 0));
    test_order(sound);
    IndexParts mutated = sound;
    mutate_order(mutated);
    test_order(mutated);
    mutate(mutated);
    test_order(mutated);
  }
  test_order({{0}, {}, {}, 4});
  test_order({{0, 1, 2}, {1, 0}, {0, 1}, 2});  // in the order of the columns
}

void test_same(const IndexParts& by_row, const IndexParts& by_column, bool same) {
  set_place("transposed", by_column);
  StoredIndex rows(by_row), columns(by_column);
  cuda::Fault fault = cuda::kNoFault;
  const cudaError_t error = cuda::prove_transposed(rows.index, columns.index, &fault, nullptr);
  check(error == cudaSuccess, "returns %d", static_cast<int>(error));
  check((fault == cuda::kNoFault) == same, "fault %llx, yet the indices are %s", fault, same ? "the same" : "not the same");
  check(fault == cuda::kNoFault || fault < static_cast<cuda::Fault>(std::max<int64_t>(by_column.lines(), 1)), "%llx is no line", fault);
}

bool equal(const IndexParts& a, const IndexParts& b) { return a.starts == b.starts && a.positions == b.positions && a.order == b.order; }

void test_transposed() {
  for (int i = 0; i < 120; ++i) {
    const int64_t lines = 1 + random_below(i < 6 ? 60 : 7), limit = 1 + random_below(i < 6 ? 60 : 7);
    const IndexParts by_row = random_index(lines, limit, 0.5, i % 3 == 0), by_column = transpose(by_row);
    test_same(by_row, by_column, true);
    for (const auto change : {mutate, mutate_order}) {
      IndexParts mutated = by_column;
      change(mutated);
      test_same(by_row, mutated, equal(mutated, by_column));
    }
    const IndexParts other = random_index(lines, limit, 0.5, i % 3 == 0);
    if (other.blocks() == by_row.blocks())
      test_same(by_row, transpose(other), other.positions == by_row.positions && other.starts == by_row.starts);
    IndexParts faulty = by_row;  // only the bounds of its buffers are to be kept to
    mutate(faulty);
    StoredIndex rows(faulty), columns(by_column);
    cuda::Fault fault = cuda::kNoFault;
    check(cuda::prove_transposed(rows.index, columns.index, &fault, nullptr) == cudaSuccess, "fails");
  }
  test_same({{0}, {}, {}, 3}, {{0, 0, 0, 0}, {}, {}, 0}, true);
  test_same({{0, 0, 0}, {}, {}, 0}, {{0}, {}, {}, 2}, true);
  test_same({{0, 1}, {0}, {}, 0}, {{0}, {0}, {0}, 1}, false);
  test_same({{0, 1, 2}, {0, 0}, {}, 1}, {{0, 2}, {0, 0}, {0, 0}, 2}, false);  // one block twice, where it is in each
}

void test_schedule(const IndexParts& index) {
  set_place("schedule", index);
  StoredIndex stored(index);
  Buffer schedule(index.lines() * 4);
  const cudaError_t error = cuda::schedule_lines(stored.index, reinterpret_cast<int32_t*>(schedule.data()), nullptr);
  check(error == cudaSuccess && schedule.canaries_intact(), "returns %d, or writes outside", static_cast<int>(error));
  std::vector<int32_t> got(static_cast<size_t>(index.lines())), expected(got.size());
  if (!got.empty()) std::memcpy(got.data(), schedule.data(), got.size() * 4);
  std::iota(expected.begin(), expected.end(), 0);
  if (fault_of(index) != cuda::kNoFault) {  // then lines in any order
    check(std::set<int32_t>(got.begin(), got.end()) == std::set<int32_t>(expected.begin(), expected.end()), "is no order of the lines");
    return;
  }
  const auto blocks = [&](int32_t line) { return index.starts[static_cast<size_t>(line) + 1] - index.starts[static_cast<size_t>(line)]; };
  std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return blocks(a) > blocks(b); });
  check(got == expected, "wrong order");
}

// Lines of so many blocks, up to `most`, without positions that anybody would read.
IndexParts lines_of_lengths(int64_t lines, int64_t most) {
  IndexParts index{{0}, {}, {}, most};
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = random_below(most + 1); i > 0; --i) index.positions.push_back(most - i);
    index.starts.push_back(index.blocks());
  }
  return index;
}

void test_schedules() {
  for (const int64_t lines : {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 500, 1024, 2049}) test_schedule(lines_of_lengths(lines, 9));
  for (int i = 0; i < 20; ++i) test_schedule(lines_of_lengths(random_below(200), i));
  IndexParts mutated = lines_of_lengths(100, 5);
  for (int i = 0; i < 10; ++i, mutate(mutated)) test_schedule(mutated);
  test_schedule(lines_of_lengths(4096, 2));
  for (const int64_t lines : {4097, 8192, 12289}) test_schedule(lines_of_lengths(lines, 3));  // more than one launch
}

TEST_FAMILY(block_index) {
  test_proofs();
  test_orders();
  test_transposed();
  test_schedules();
}

// An index that claims more than it has.
void prove_short(int64_t starts_missing, int64_t positions_missing) {
  IndexParts index = random_index(5, 5, 1, false);
  StoredIndex whole(index);
  index.starts.resize(index.starts.size() - static_cast<size_t>(starts_missing));
  index.positions.resize(index.positions.size() - static_cast<size_t>(positions_missing));
  StoredIndex rest(index);
  whole.index.starts = rest.index.starts;
  whole.index.positions = rest.index.positions;
  cuda::Fault fault;
  cuda::prove_block_index(whole.index, nullptr, &fault, nullptr);
}

PLANTED_ERROR(proof_past_starts, "heap-buffer-overflow") { prove_short(1, 0); }
PLANTED_ERROR(proof_past_positions, "heap-buffer-overflow") { prove_short(0, 1); }

}  // namespace
}  // namespace bitmask::testing
