// One error of each kind that compute-sanitizer is asked to find, to prove that it does: planted clean|oob|race|uninit|barrier
// The kernels are in namespace bitmask, since the tools are told to look at kernels whose name says so.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace bitmask {

constexpr int kThreads = 64;

// Nothing is wrong: each thread copies one element, by way of shared memory.
__global__ void clean(const int* in, int* out) {
  __shared__ int memory[kThreads];
  memory[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
}

// memcheck: the last thread writes behind the buffer.
__global__ void out_of_bounds(const int* in, int* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

// racecheck: no barrier between the writes of one warp and the reads of the other.
__global__ void race(const int* in, int* out) {
  __shared__ int memory[kThreads];
  memory[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
}

// synccheck: one warp and a half wait at a barrier that the other threads never reach.
__global__ void divergent_barrier(const int* in, int* out) {
  if (threadIdx.x < 48) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace bitmask

int main(int count, char** arguments) {
  const char* const mode = count == 2 ? arguments[1] : "";
  const size_t bytes = bitmask::kThreads * sizeof(int);
  int *in, *out;
  if (cudaMalloc(&in, bytes) != cudaSuccess || cudaMalloc(&out, bytes) != cudaSuccess) return 3;
  // initcheck: nothing is written to `in` before it is read.
  if (std::strcmp(mode, "uninit") != 0 && cudaMemset(in, 1, bytes) != cudaSuccess) return 3;

  if (std::strcmp(mode, "clean") == 0 || std::strcmp(mode, "uninit") == 0) {
    bitmask::clean<<<1, bitmask::kThreads>>>(in, out);
  } else if (std::strcmp(mode, "oob") == 0) {
    bitmask::out_of_bounds<<<1, bitmask::kThreads>>>(in, out);
  } else if (std::strcmp(mode, "race") == 0) {
    bitmask::race<<<1, bitmask::kThreads>>>(in, out);
  } else if (std::strcmp(mode, "barrier") == 0) {
    bitmask::divergent_barrier<<<1, bitmask::kThreads>>>(in, out);
  } else {
    std::fprintf(stderr, "usage: planted clean|oob|race|uninit|barrier\n");
    return 2;
  }
  const cudaError_t launched = cudaGetLastError(), done = cudaDeviceSynchronize();
  return launched == cudaSuccess && done == cudaSuccess ? 0 : 4;
}
