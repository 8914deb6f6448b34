// One instruction per function; nothing else contains inline PTX, but for what sm_90a alone has (ptx_warpgroup.cuh). Sources include this
// file as <ptx.cuh>, by the include path, so that tests/cuda/twin can put functions that do the same on a CPU in its place. Semantics: PTX
// ISA, sections named beside each.
#pragma once

#include <cstdint>

namespace bitmask::cuda::ptx {

// The dynamic shared memory of the block; kernels have no other.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// cp.async.cg: 16 bytes from global to shared memory, both aligned to 16, past the first cache. Of the source only `bytes` are read, from
// its beginning; the rest of the target becomes zero.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but this thread's `kPending` latest groups are there; other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix.x4: four 8x8 matrices of 16-bit elements. Lane 8 i + j names row j of matrix i (16 bytes, aligned); of each matrix, lane l gets
// the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same with each matrix transposed: lane l gets the elements l / 4 of the rows 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// mma.m16n8k16, row.col: d += a b with fp32 sums. With g = lane / 4 and t = lane % 4, a holds the pairs of columns (2t, 2t + 1) of rows g
// and g + 8, then (2t + 8, 2t + 9) of rows g and g + 8; b the pairs of rows (2t, 2t + 1), then (2t + 8, 2t + 9), of column g; d the columns
// (2t, 2t + 1) of row g, then of row g + 8.
__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.m16n8k8, row.col, tf32: d += a b with fp32 sums, of operands that round_to_tfloat32 has made. With g = lane / 4 and t = lane % 4, a
// holds column t of rows g and g + 8, then column t + 4 of rows g and g + 8; b the rows t, then t + 4, of column g; d as above.
__device__ __forceinline__ void mma_tfloat32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sp.m16n8k32, row.col: d += a b with fp32 sums, a being 2:4: of each group of four columns two are stored, and only they are
// multiplied. PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". With g = lane / 4 and t = lane % 4, a holds
// the 16 stored columns as that of mma.m16n8k16; b the pairs of rows (2t, 2t + 1) + 0, 8, 16, 24 of column g; d as above.
//
// `codes`: four bits for each group, the lower stored column in the lower two of them, the higher one above: 4, 8, 9, 12, 13 or 14 (others
// are undefined). Of each four lanes those count whose t / 2 is kSelector: their lower half are the codes of row g, their upper half those
// of row g + 8, of the columns 16 (t % 2) to 16 (t % 2) + 15. (CUTLASS's reordered metadata say the same: FORMAT.md has memory as [8 rows]
// [2 selectors][2 halves of 32 columns][rows r, r + 8], and of such 16 bytes ldmatrix hands 4 to each of four lanes.)
template <int kSelector>
__device__ __forceinline__ void mma_sparse_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
      "{%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(codes), "n"(kSelector));
}

template <int kSelector>
__device__ __forceinline__ void mma_sparse_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
      "{%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(codes), "n"(kSelector));
}

// The bits of a float32 rounded to the 10 bits of mantissa that tf32 has: to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tfloat32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ld.acquire and st.release at the scope of the GPU.
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// ld.relaxed and st.relaxed at the scope of the GPU: for words that carry all there is to know. An acquire would empty the first cache,
// a release would wait for all that the thread has written.
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// prmt: byte i of the result is byte s % 8 of (high, low), s being nibble i of the selector; where s has bit 3 set, the top bit of that
// byte, eight times. (__byte_perm clears bit 3.)
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// The same value, of which the compiler does not know how it came about. It keeps a pointer that it would else compute anew in a loop, and
// computes anew what it would else keep in registers.
template <typename T>
__device__ __forceinline__ T opaque(T value) {
  if constexpr (sizeof(T) == 4) asm volatile("" : "+r"(value));
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(value));
  return value;
}

// Lets others run while waiting for them.
__device__ __forceinline__ void pause() { asm volatile("nanosleep.u32 32;"); }

// Rounded to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace bitmask::cuda::ptx
