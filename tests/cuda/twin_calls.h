// How the tests of the twin run kernels.
#pragma once

#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>

#include "testing.h"

namespace bitmask::testing {

constexpr unsigned int kAll = 0xffffffff;  // lanes

template <typename... Parameters, typename... Arguments>
cudaError_t launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// What a thread of a kernel checks; its book-keeping is not the kernel's.
inline void expect(bool ok, const char* what, int64_t value = 0) {
  const twin::Unwatched unwatched;
  check(ok, "%s (%" PRId64 ")", what, value);
}

// One block of one warp in which every lane calls `body`.
__global__ inline void call(const std::function<void(int)>* body) { (*body)(static_cast<int>(threadIdx.x)); }

inline void run_warp(const std::function<void(int)>& body, std::size_t shared_bytes = 0) {
  check(launch(1, 32, shared_bytes, call, &body) == cudaSuccess, "launch of one warp");
}

inline void run_block(int threads, const std::function<void(int)>& body, std::size_t shared_bytes = 0) {
  check(launch(1, static_cast<unsigned int>(threads), shared_bytes, call, &body) == cudaSuccess, "launch of a block");
}

// Checks that `body` ends the process with a report that contains `report`.
inline void check_dies(const char* report, const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char part[4096];
  for (ssize_t size; (size = read(ends[0], part, sizeof(part))) > 0;) said.append(part, static_cast<std::size_t>(size));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  check(status != 0, "\"%s\" did not end the process", report);
  check(said.find(report) != std::string::npos, "\"%s\" is not in this report:\n%s", report, said.c_str());
}

}  // namespace bitmask::testing
