// What sm_90a does beside its threads (warpgroup.h has the idea). PTX ISA, sections named beside each.
#include "warpgroup.h"

#include <cstring>
#include <map>
#include <utility>

#include "copies.h"
#include "stack.h"

namespace bitmask::twin {
namespace {

constexpr int kLine = 128;  // bytes that the swizzle of 128 bytes takes at a time: eight pieces of 16

uint32_t offset_of(const void* shared) { return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - shared_memory()); }

// "Tensor swizzling modes", 128 bytes: bits 4 to 6 of an address are exchanged for what they and bits 7 to 9 are together.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// ---------------------------------------------------------------------------------------------------------------- mbarriers

// How the 8 bytes are used, which PTX leaves open.
struct Barrier {
  int32_t bytes;      // announced and not yet copied
  uint16_t arrivals;  // of a phase
  uint16_t missing : 15, parity : 1;
};
static_assert(sizeof(Barrier) == 8);

constexpr uint32_t kMostArrivals = 1024;  // of a kernel here; what memory holds at first is more

Barrier& barrier_at(const char* name, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("%s: %p is not aligned to 8 bytes", name, static_cast<void*>(barrier));
  if (!is_shared(barrier, 8)) fail("%s: %p is outside of the block's shared memory", name, static_cast<void*>(barrier));
  Barrier& state = *reinterpret_cast<Barrier*>(barrier);
  if (state.arrivals > kMostArrivals) fail("%s: this barrier has not begun", name);
  return state;
}

void end_phase_if_complete(Barrier& state) {
  if (state.missing != 0 || state.bytes != 0) return;
  state.missing = static_cast<uint16_t>(state.arrivals & 0x7fff);
  state.parity = static_cast<uint16_t>(!state.parity);
  unpark(&state);
}

// ---------------------------------------------------------------------------------------------------------------- copies

struct Box {
  uint8_t* shared;
  CUtensorMap map;  // a kernel's parameter may be gone when the copy is done
  int32_t column, row;
  uint64_t* barrier;
};
std::vector<Box>& under_way = *new std::vector<Box>;

// "cp.async.bulk.tensor": what is outside of the matrix is zero.
void do_copy(const Box& box) {
  acquire(box.barrier);
  for (uint32_t i = 0; i < box.map.box_rows; ++i) {
    uint16_t line[kLine / 2] = {};
    const int64_t row = int64_t{box.row} + i;
    if (row >= 0 && row < static_cast<int64_t>(box.map.rows)) {
      const uint16_t* const from = box.map.matrix + static_cast<uint64_t>(row) * box.map.stride / 2;
      for (int64_t j = 0; j < kLine / 2; ++j) {
        const int64_t column = box.column + j;
        if (column >= 0 && column < static_cast<int64_t>(box.map.cols)) line[j] = from[column];
      }
    }
    for (uint32_t piece = 0; piece < kLine; piece += 16) {
      const uint32_t to = swizzled(offset_of(box.shared) + i * kLine + piece);
      std::memcpy(shared_memory() + to, reinterpret_cast<const uint8_t*>(line) + piece, 16);
    }
  }
  release(box.barrier);
  const Unwatched unwatched;
  Barrier& state = barrier_at("cp.async.bulk.tensor", box.barrier);
  state.bytes -= static_cast<int32_t>(box.map.box_rows) * kLine;
  end_phase_if_complete(state);
}

// Does one of the copies that a barrier waits for; which one is the copy engine's choice.
bool do_some_copy(const uint64_t* barrier) {
  Box box{};
  {
    const Unwatched unwatched;
    for (std::size_t i = 0; i < under_way.size() && box.shared == nullptr; ++i) {
      if (under_way[i].barrier != barrier) continue;
      box = under_way[i];
      under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  if (box.shared != nullptr) do_copy(box);
  return box.shared != nullptr;
}

}  // namespace

void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  if (arrivals == 0 || arrivals > kMostArrivals) fail("mbarrier.init: %u arrivals", arrivals);
  *barrier = 0;
  const Unwatched unwatched;
  Barrier& state = barrier_at("mbarrier.init", barrier);
  state.arrivals = static_cast<uint16_t>(arrivals);
  state.missing = static_cast<uint16_t>(arrivals & 0x7fff);
}

void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
  release(barrier);
  const Unwatched unwatched;
  Barrier& state = barrier_at("mbarrier.arrive", barrier);
  if (state.missing == 0) fail("mbarrier.arrive: all %d have arrived", state.arrivals);
  state.bytes += static_cast<int32_t>(bytes);
  --state.missing;
  end_phase_if_complete(state);
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  yield();
  for (;;) {
    {
      const Unwatched unwatched;
      if (barrier_at("mbarrier.try_wait", barrier).parity != (parity & 1)) break;
    }
    if (!do_some_copy(barrier)) park(barrier, "mbarrier.try_wait", site);
  }
  acquire(barrier);
}

void copy_box(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier) {
  const char* const name = "cp.async.bulk.tensor";
  if (map->box_rows == 0) fail("%s: not a tensor map", name);
  const std::size_t bytes = std::size_t{map->box_rows} * kLine;
  if (!is_shared(shared, bytes)) fail("%s: target %p is outside of the block's shared memory", name, shared);
  if (offset_of(shared) % 128 != 0) fail("%s: target %p is not aligned to 128 bytes", name, shared);
  std::memset(shared, senseless_byte(), bytes);
  release(barrier);
  const Box box{static_cast<uint8_t*>(shared), *map, column, row, barrier};
  if (copies_early()) {
    do_copy(box);
  } else {
    const Unwatched unwatched;
    under_way.push_back(box);
    unpark(barrier);
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplications

namespace {

// "Matrix descriptor": where element (row, k) of an operand lies; rows are columns of B.
struct Operand {
  const uint8_t* shared;
  uint32_t start, along, group;
  bool transposed;

  Operand(uint64_t bits, bool is_transposed, uint32_t rows)
      : shared(shared_memory()),
        start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        along(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        group(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        transposed(is_transposed) {
    if (bits >> 62 != 1) fail("wgmma: a swizzle other than that of 128 bytes");
    if ((bits >> 49 & 7) != 0) fail("wgmma: a base offset");
    const uint32_t begin = start / kLine * kLine, end = start + offset(rows - 1, 15) + 2;
    if (!is_shared(shared + begin, (end + kLine - 1) / kLine * kLine - begin))
      fail("wgmma: an operand is not in the block's shared memory");
  }

  // "Strides": K-major ((8, rows / 8), k) : ((128, group), 2) bytes; MN-major ((64, rows / 64), (8, k / 8)) : ((2, along), (128, group)).
  uint32_t offset(uint32_t row, uint32_t k) const {
    return transposed ? row % 64 * 2 + row / 64 * along + k % 8 * kLine + k / 8 * group : row % 8 * kLine + row / 8 * group + 2 * k;
  }

  uint16_t element(uint32_t row, uint32_t k) const { return *reinterpret_cast<const uint16_t*>(shared + swizzled(start + offset(row, k))); }
};

constexpr int kGroupThreads = 128;

// "Register fragments for wgmma.mma_async.m64nNk16", D. Products are exact; each sum of 16 of them and d is taken in double precision and
// rounded once, where a GPU sums in its own way.
void do_multiply(const Multiplication& m, std::vector<float>& d) {
  const Operand a(m.a, m.transposed_a, 64), b(m.b, m.transposed_b, static_cast<uint32_t>(2 * d.size()));
  const uint32_t thread = thread_index.x % kGroupThreads, top = thread / 32 * 16 + thread % 32 / 4;
  double rows[2][16];
  for (uint32_t k = 0; k < 16; ++k) {
    rows[0][k] = m.widen(a.element(top, k));
    rows[1][k] = m.widen(a.element(top + 8, k));
  }
  for (std::size_t i = 0; i < d.size(); i += 4) {
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t column = static_cast<uint32_t>(2 * i + thread % 4 * 2 + j);
      double upper = d[i + j], lower = d[i + 2 + j];
      for (uint32_t k = 0; k < 16; ++k) {
        const double element = m.widen(b.element(column, k));
        upper += rows[0][k] * element;
        lower += rows[1][k] * element;
      }
      d[i + j] = static_cast<float>(upper);
      d[i + 2 + j] = static_cast<float>(lower);
    }
  }
}

// Does the multiplications of groups before `end`.
void do_multiplications(int64_t end) {
  Multiplications& mine = multiplications();
  std::size_t done = 0;
  while (done < mine.waiting.size() && mine.waiting[done].group < end) do_multiply(mine.waiting[done++], mine.sums);
  mine.waiting.erase(mine.waiting.begin(), mine.waiting.begin() + static_cast<std::ptrdiff_t>(done));
}

// What a warpgroup has multiplied, by the warp that came first, and how much of it each warp has.
struct Warpgroup {
  std::vector<std::pair<uint64_t, uint64_t>> operands;
  std::size_t counts[kGroupThreads / kLanes];
};
std::map<std::pair<const void*, unsigned int>, Warpgroup>& warpgroups = *new std::map<std::pair<const void*, unsigned int>, Warpgroup>;

void check_together(const Multiplication& m) {
  const Unwatched unwatched;
  Warpgroup& group = warpgroups[{shared_memory(), thread_index.x / kGroupThreads}];
  const std::pair<uint64_t, uint64_t> operands{m.a, m.b};
  std::size_t& count = group.counts[thread_index.x % kGroupThreads / kLanes];
  if (count == group.operands.size()) group.operands.push_back(operands);
  if (group.operands[count++] != operands) fail("wgmma: warps of a warpgroup multiply different operands");
}

}  // namespace

void multiply_fence() { multiplications().fenced = true; }

void multiply(float* d, int sums, const Multiplication& multiplication) {
  Multiplications& mine = multiplications();
  if (!mine.fenced) fail("wgmma: no wgmma.fence before");
  if (lane() == 0) check_together(multiplication);
  if (mine.target != nullptr && mine.target != d) fail("wgmma: sums elsewhere while others are under way, which is not imitated");
  if (mine.target == nullptr) {
    mine.target = d;
    mine.sums.assign(d, d + sums);
    std::memset(d, 0xff, static_cast<std::size_t>(sums) * sizeof(float));
  }
  mine.waiting.push_back(multiplication);
  mine.waiting.back().group = mine.group;
}

void multiply_commit() {
  Multiplications& mine = multiplications();
  ++mine.group;
  mine.fenced = false;
  if (copies_early()) do_multiplications(mine.group);
}

void multiply_wait(int pending) {
  Multiplications& mine = multiplications();
  do_multiplications(mine.group - pending);
  if (mine.target != nullptr && pending == 0) {
    if (!mine.waiting.empty()) fail("wgmma.wait_group: multiplications that were not committed");
    std::memcpy(mine.target, mine.sums.data(), mine.sums.size() * sizeof(float));
    mine.target = nullptr;
  }
}

void finish_multiplications() {
  Multiplications& mine = multiplications();
  if (mine.target != nullptr) fail("ends before its multiplications");
  mine.fenced = false;
  mine.group = 0;
}

void finish_warpgroups() {
  if (!under_way.empty()) fail("a kernel ends before its copies");
  for (const auto& [place, group] : warpgroups) {
    for (const std::size_t count : group.counts) {
      if (count != group.operands.size()) fail("wgmma: some warps of a warpgroup did not multiply");
    }
  }
  warpgroups.clear();
}

}  // namespace bitmask::twin

// ---------------------------------------------------------------------------------------------------------------- tensor maps

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr uint64_t kMostSize = uint64_t{1} << 32, kMostStride = uint64_t{1} << 40;
  *map = {};
  if (type != CU_TENSOR_MAP_DATA_TYPE_UINT16 || rank != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  if (address == nullptr || reinterpret_cast<uintptr_t>(address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] % 16 != 0 || strides[0] >= kMostStride || strides[0] < 2 * sizes[0]) return CUDA_ERROR_INVALID_VALUE;
  if (sizes[0] == 0 || sizes[1] == 0 || sizes[0] > kMostSize || sizes[1] > kMostSize) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] != 64 || box[1] == 0 || box[1] > 256 || steps[0] != 1 || steps[1] != 1) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint16_t*>(address), sizes[1], sizes[0], strides[0], box[1]};
  return CUDA_SUCCESS;
}
