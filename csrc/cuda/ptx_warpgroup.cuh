// Instructions of sm_90a, as ptx.cuh has those of every GPU: one per function, semantics in the PTX ISA sections named beside each.
// Included as <ptx_warpgroup.cuh>, so that tests/cuda/twin can put functions that do the same on a CPU in its place. Only what is compiled
// for sm_90a itself, where __CUDA_ARCH_FEAT_SM90_ALL is defined, may call them.
#pragma once

#include <cuda.h>

#include <ptx.cuh>

#include <cstdint>

namespace bitmask::cuda::ptx {

// ---------------------------------------------------------------------------------------------------------------- mbarriers

// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A barrier is 8 bytes of shared memory. Its phases have the
// parities 0, 1, 0, ... A phase completes when `arrivals` have come and as many bytes as were announced have been copied; what threads did
// before they arrived, and what was copied, is seen by those that have waited for it.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// "membar / fence": makes barriers that this thread has begun known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// "mbarrier.arrive"
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.arrive", .expect_tx: announces bytes to be copied in the phase, and arrives.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// "mbarrier.test_wait / mbarrier.try_wait", .parity: whether the phase of this parity is over: that which is under way, if its parity is
// this one, or else the one before it. The thread may be suspended for a while until it is.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
               : "=r"(over)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return over != 0;
}

// ---------------------------------------------------------------------------------------------------------------- copies of tiles

// "Data Movement and Conversion Instructions: cp.async.bulk.tensor": copies the box of a matrix that begins at (column, row), as laid out
// by its map, and tells the barrier of its bytes; what of it lies outside of the matrix becomes zero. Rows of the box are 128 bytes, one
// after the other from `shared` on, which is aligned to 1024 bytes; with the swizzle of 128 bytes, piece i of 16 bytes of row r lies where
// piece i ^ r % 8 would.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(shared)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

// "prefetch", .tensormap
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---------------------------------------------------------------------------------------------------------------- matrices

// "Warp-level matrix store instruction: stmatrix", .x4: the reverse of ldmatrix (ptx.cuh).
__device__ __forceinline__ void store_matrix_x4(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4_transposed(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// "Asynchronous Warpgroup Level Matrix Instructions", "Matrix descriptor": an operand of 16-bit elements in shared memory, in lines of 128
// bytes swizzled as copy_box leaves them, the first one aligned to 1024 bytes. Along a line either the sum runs (k), or the rows of A and
// the columns of B do (transposed):
//
//   by k         line i is row i, eight lines are a group, groups are `group` bytes apart; `along` is unused
//   transposed   line i is k = i, for 64 rows; eight lines are a group, groups are `group` bytes apart; the next 64 rows are `along`
//   further
//
// Bits 0-13: address, 16-29: along, 32-45: group, all in units of 16 bytes; 62-63: the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t operand_of(const void* shared, uint32_t along, uint32_t group) {
  const uint32_t low = (shared_address(shared) & 0x3ffff) >> 4 | along >> 4 << 16, high = group >> 4 | 1u << 30;
  return static_cast<uint64_t>(high) << 32 | low;
}

// "wgmma.fence": orders what the warpgroup did to registers before what its next multiplications do to them.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group", "wgmma.wait_group": multiplications so far are a group; waits until all but the latest kPending groups are done.
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Waits for all groups, and keeps the compiler from reading sums before.
template <int kSums>
__device__ __forceinline__ void warpgroup_wait_for(float (&d)[kSums]) {
  warpgroup_wait<0>();
#pragma unroll
  for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}

// "wgmma.mma_async", m64n128k16 and m64n256k16: d += a b with fp32 sums, by the 128 threads of a warpgroup, operands as operand_of tells.
// Of a warp's 16 rows, the four sums d[4 j ...] are those of mma.m16n8k16 (ptx.cuh) for the columns 8 j to 8 j + 7. Done some time before
// warpgroup_wait returns: until then nobody may read d or write what is multiplied.
#define BITMASK_REGISTERS_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BITMASK_REGISTERS_128                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BITMASK_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define BITMASK_SUMS_32(i) BITMASK_SUMS_8(i), BITMASK_SUMS_8(i + 8), BITMASK_SUMS_8(i + 16), BITMASK_SUMS_8(i + 24)
#define BITMASK_SUMS_64 BITMASK_SUMS_32(0), BITMASK_SUMS_32(32)
#define BITMASK_SUMS_128 BITMASK_SUMS_64, BITMASK_SUMS_32(64), BITMASK_SUMS_32(96)

// `a` and `b` are the numbers of the placeholders after those of the sums.
#define BITMASK_WARPGROUP_MULTIPLY(name, type, sums, columns, a, b, transposed_a, transposed_b)                     \
  template <bool kTransposedA, bool kTransposedB>                                                                   \
  __device__ __forceinline__ void name(float (&d)[sums], uint64_t operand_a, uint64_t operand_b) {                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" BITMASK_REGISTERS_##sums \
                 "}, " a ", " b ", 1, 1, 1, " transposed_a ", " transposed_b ";"                                    \
                 : BITMASK_SUMS_##sums                                                                              \
                 : "l"(operand_a), "l"(operand_b), "n"(kTransposedA), "n"(kTransposedB));                           \
  }
BITMASK_WARPGROUP_MULTIPLY(warpgroup_multiply_bfloat16, "bf16", 64, "128", "%64", "%65", "%66", "%67")
BITMASK_WARPGROUP_MULTIPLY(warpgroup_multiply_bfloat16, "bf16", 128, "256", "%128", "%129", "%130", "%131")
BITMASK_WARPGROUP_MULTIPLY(warpgroup_multiply_float16, "f16", 64, "128", "%64", "%65", "%66", "%67")
BITMASK_WARPGROUP_MULTIPLY(warpgroup_multiply_float16, "f16", 128, "256", "%128", "%129", "%130", "%131")
#undef BITMASK_WARPGROUP_MULTIPLY
#undef BITMASK_SUMS_128
#undef BITMASK_SUMS_64
#undef BITMASK_SUMS_32
#undef BITMASK_SUMS_8
#undef BITMASK_REGISTERS_128
#undef BITMASK_REGISTERS_64

}  // namespace bitmask::cuda::ptx
