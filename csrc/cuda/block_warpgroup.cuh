// What the products of block_warpgroup.cu share: a pipeline from the copy engine to the tensor cores of sm_90a.
//
//   warp 8: lane 0 asks for tiles     slots in shared memory, 1024-aligned                warps 0-3 and 4-7: two warpgroups
//   of A and B, 64 k at a time    --> | A 64 or 128 rows | B up to 512 columns |  full -->  sums += A B, 64 rows x kColumns each
//                                 <-- | A                | B                   |  empty <--
//
// Each slot comes with a message: multiply, or the tile of the result ends here, sound or faulty. So the warp that copies alone walks the
// index, and whatever it finds there, those that multiply only ever wait for the next message.
//
// Of nine warps, one of the four schedulers has three, which leaves 168 registers for each thread: enough for 128 sums, so that no warp has
// to hand over registers to others (setmaxnreg).
#pragma once

#include <ptx_warpgroup.cuh>

#include <cstdint>

#include "elements.cuh"

namespace bitmask::cuda {

constexpr int kDepth = 64;                    // of a slot: k in a line of 128 bytes
constexpr int kLineBytes = 128;               // of A and B: 64 elements
constexpr int kPanelBytes = 64 * kLineBytes;  // of 64 x 64 elements
constexpr int kMultipliers = 256;             // threads: two warpgroups
constexpr int kThreads = kMultipliers + 32;   // and the warp that copies
constexpr int kStagingBytes = 1024;           // of a warp, for results on their way to memory
constexpr int kMostShared = 227 * 1024;       // bytes
constexpr int kMostSlots = 8;

// The tile that is a block's `turn`-th: tiles are dealt to one block of threads for each multiprocessor, there and back again, so that
// tiles with much to do, which come first, are followed by those with little.
__device__ __forceinline__ int64_t dealt(int turn) {
  return int64_t{turn} * gridDim.x + (turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// By all threads of the grid. `count` is a multiple of 8.
__device__ __forceinline__ void fill_with_nan(uint16_t* elements, int64_t count) {
  const uint4 nan = make_uint4(0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff);  // in bf16 and fp16
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count / 8; i += int64_t{gridDim.x} * kThreads) {
    reinterpret_cast<uint4*>(elements)[i] = nan;
  }
}

enum Message : int32_t { kMultiplySlot, kEndSound, kEndFaulty };

struct Control {
  uint64_t full[kMostSlots], empty[kMostSlots];  // mbarriers
  int32_t messages[kMostSlots];
};

// What a block of threads makes of the result at a time. What a slot costs an H100, in cycles of a multiprocessor: wgmma reads A and B from
// shared memory, which takes 128 bytes a cycle and the copies besides; 5.5 TB/s of the second cache are 24 bytes a cycle. Not timed.
//
//   tile           tensor cores   shared memory: read + written   second cache   of the tensor cores' peak, at most
//   128 x 256          1024             640 + 384                     2070                  49%
//   128 x 128           512             384 + 256                     1380                  37%
//    64 x 512          1024             640 + 576                     3110                  33%
//    64 x 256           512             384 + 320                     1730                  30%
//
// Storing a tile of 128 x 256 takes 900 cycles of each scheduler and 2770 of the second cache, while the next slots are filled.
//
// kStacked  whether the warpgroups take 64 rows of A each with the same columns of B, or the same 64 rows with columns of their own
// kColumns  of B, for a warpgroup: 128 or 256
template <bool kStacked_, int kColumns_>
struct Tile {
  static constexpr bool kStacked = kStacked_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRows = kStacked ? 128 : 64;                       // of A
  static constexpr int kAllColumns = kStacked ? kColumns : 2 * kColumns;  // of B
  static constexpr int kABytes = kRows * kLineBytes, kBBytes = kAllColumns * kLineBytes, kSlotBytes = kABytes + kBBytes;
  static constexpr int kOtherBytes = kMultipliers / 32 * kStagingBytes + static_cast<int>(sizeof(Control));
  static constexpr int kFit = (kMostShared - 1024 - kOtherBytes) / kSlotBytes;
  static constexpr int kSlots = kFit < kMostSlots ? kFit : kMostSlots;
  static constexpr int kSharedBytes = 1024 + kSlots * kSlotBytes + kOtherBytes;  // 1024: to align what comes first
  using Sums = float[kColumns / 2];                                              // of a thread
};

// Where the threads of a block meet.
template <typename T>
struct Pipeline {
  uint8_t* slots;
  int slot = 0;
  uint32_t parity = 0;

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // Which warpgroup a thread is of, and where its rows of A and its columns of B begin.
  static __device__ __forceinline__ int group() { return warp() / 4; }
  static __device__ __forceinline__ int first_row() { return T::kStacked ? 64 * group() : 0; }
  static __device__ __forceinline__ int first_column() { return T::kStacked ? 0 : T::kColumns * group(); }

  __device__ __forceinline__ Pipeline() {
    uint8_t* const memory = ptx::dynamic_shared<uint8_t>();
    slots = memory + (0u - ptx::shared_address(memory)) % 1024;
    if (threadIdx.x == 0) {
      for (int i = 0; i < T::kSlots; ++i) {
        ptx::barrier_init(&control().full[i], 1);
        ptx::barrier_init(&control().empty[i], kMultipliers / 32);
      }
      ptx::fence_barrier_init();
    }
    __syncthreads();
  }

  __device__ __forceinline__ Control& control() const { return *reinterpret_cast<Control*>(slots + T::kSlots * T::kSlotBytes); }
  __device__ __forceinline__ uint8_t* staging() const {
    return slots + T::kSlots * T::kSlotBytes + sizeof(Control) + warp() * kStagingBytes;
  }

  __device__ __forceinline__ void advance() {
    if (++slot < T::kSlots) return;
    slot = 0;
    parity ^= 1;
  }

  static __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    while (!ptx::barrier_try_wait(barrier, parity)) {
    }
  }

  // For the warp that copies: waits for a slot to be free and sends it with a message, `bytes` being announced. Any lane may then ask for
  // copies to it by copy().
  __device__ __forceinline__ void send(Message message, uint32_t bytes) {
    if (lane() == 0) {
      wait(&control().empty[slot], parity ^ 1);
      control().messages[slot] = message;
      ptx::barrier_arrive_expect(&control().full[slot], bytes);
    }
    __syncwarp();
  }

  // A box of `map`, at (column, row), to the slot, `offset` bytes from its beginning.
  __device__ __forceinline__ void copy(int offset, const CUtensorMap& map, int64_t column, int64_t row) const {
    ptx::copy_box(slots + slot * T::kSlotBytes + offset, &map, static_cast<int32_t>(column), static_cast<int32_t>(row),
                  &control().full[slot]);
  }

  // For a warp that multiplies: has done with a slot.
  __device__ __forceinline__ void release(int done) const {
    __syncwarp();
    if (lane() == 0) ptx::barrier_arrive(&control().empty[done]);
  }

  // sums += A B of all slots until a tile ends -> whether it ends sound. Who is not active has no column of the result and multiplies
  // nothing. A slot is released when the multiplications of the one after it have been asked for: the tensor cores are never idle between.
  //
  // kTransposedA, kTransposedB  whether lines run along rows of A and columns of B (ptx::operand_of), or else along k
  template <LinearDtype kDtype, bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ bool multiply(bool active, typename T::Sums& sums) {
    int before = -1;  // slot whose multiplications may be under way
    for (;; advance()) {
      wait(&control().full[slot], parity);
      const int32_t message = control().messages[slot];
      if (message != kMultiplySlot) {
        ptx::warpgroup_wait_for(sums);
        if (before >= 0) release(before);
        release(slot);
        advance();
        return message == kEndSound;
      }
      if (active) multiply_slot<kDtype, kTransposedA, kTransposedB>(sums);
      ptx::warpgroup_wait<1>();
      if (before >= 0) release(before);
      before = slot;
    }
  }

  template <LinearDtype kDtype, bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply_slot(typename T::Sums& sums) const {
    constexpr int kGroupBytes = 8 * kLineBytes, kAlongA = kTransposedA ? kPanelBytes : 0, kAlongB = kTransposedB ? kPanelBytes : 0;
    constexpr int kStepA = (kTransposedA ? 16 * kLineBytes : 32) / 16, kStepB = (kTransposedB ? 16 * kLineBytes : 32) / 16;  // of 16 k
    const uint8_t* const memory = slots + slot * T::kSlotBytes;
    const uint64_t a = ptx::operand_of(memory + first_row() * kLineBytes, kAlongA, kGroupBytes);
    const uint64_t b = ptx::operand_of(memory + T::kABytes + first_column() * kLineBytes, kAlongB, kGroupBytes);
    ptx::warpgroup_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      if constexpr (kDtype == kFloat16) {
        ptx::warpgroup_multiply_float16<kTransposedA, kTransposedB>(sums, a + i * kStepA, b + i * kStepB);
      } else {
        ptx::warpgroup_multiply_bfloat16<kTransposedA, kTransposedB>(sums, a + i * kStepA, b + i * kStepB);
      }
    }
    ptx::warpgroup_commit();
  }
};

template <LinearDtype kDtype>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  return Element<kDtype>::narrow(low) | static_cast<uint32_t>(Element<kDtype>::narrow(high)) << 16;
}

// A warp's 16 x 16 results, of which a lane has eight sums, as 16 lines of two pieces of 8: lane l gets piece l % 2 of line l / 2. Lines
// are rows of A or, transposed, columns of B. `staging`: 512 bytes, no two turns in a row the same. The pieces of the lines 4 to 7 and 12
// to 15 change places there, so that eight lanes never meet in a bank.
template <LinearDtype kDtype, bool kTransposed>
__device__ __forceinline__ uint4 gather_pieces(const float* sums, uint8_t* staging) {
  const int lane = static_cast<int>(threadIdx.x) % 32, inside = lane % 8, low = lane / 8 % 2, high = lane / 16;
  const auto place = [=](int line, int piece) { return staging + 32 * line + 16 * (piece ^ (line / 4 % 2)); };
  const uint32_t pairs[4] = {narrow_pair<kDtype>(sums[0], sums[1]), narrow_pair<kDtype>(sums[2], sums[3]),
                             narrow_pair<kDtype>(sums[4], sums[5]), narrow_pair<kDtype>(sums[6], sums[7])};
  if constexpr (kTransposed) {
    ptx::store_matrix_x4_transposed(place(8 * high + inside, low), pairs);
  } else {
    ptx::store_matrix_x4(place(8 * low + inside, high), pairs);
  }
  __syncwarp();
  return *reinterpret_cast<const uint4*>(place(lane / 2, lane % 2));
}

}  // namespace bitmask::cuda
