// Runs CUDA kernels on the CPU, so that a test without a GPU meets what a GPU may do. Every CUDA thread is a fiber: it has a stack of its
// own and runs until it waits. Which fiber runs next is drawn from a seeded generator, several blocks are resident at a time and start in
// any order, so interleavings differ from seed to seed and can be replayed.
//
//   launch --> blocks, in order or shuffled --> 1 to 8 resident --> a fiber per thread --> runnable --> one of them runs
//                                                                                             ^               |
//                                                         collective or barrier is complete --+--  waits, yields, ends
//
// Fibers switch at collectives of a warp, barriers, atomics, acquires, releases and pauses, nowhere else. A kernel that does what CUDA
// leaves undefined, or that waits forever, ends the process with a report. What plain memory accesses of a GPU may do out of order is not
// imitated; ThreadSanitizer (tests/cuda/run.sh race) reports accesses that nothing orders. All of it is one thread of the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace bitmask::twin {

// ---------------------------------------------------------------------------------------------------------------- for tests

// Begins another sequence of schedules. The environment variable BITMASK_TWIN_SEED, where set, takes the place of `number`.
void seed(uint64_t number);

// What the device is said to be.
struct Properties {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // that one block may have if it asks for them
  int major = 9, minor = 0;
};
inline Properties properties;

// ---------------------------------------------------------------------------------------------------------------- for the headers

constexpr int kLanes = 32;

// Where something is called: a last parameter that has this default.
struct Site {
  const char* file;
  int line;
};
constexpr Site site_of(const char* file, int line) { return {file, line}; }
#define BITMASK_TWIN_SITE ::bitmask::twin::Site site = ::bitmask::twin::site_of(__builtin_FILE(), __builtin_LINE())

// Of the thread that runs.
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;
int lane();

// Runs `thread` once for every thread of the grid; the launch has been found in order.
void run_grid(const dim3& grid, const dim3& block, std::size_t shared_bytes, const std::function<void()>& thread);
bool in_kernel();

// What cudaLaunchKernelEx does.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

// Ends the process with a report that names the thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Lets any thread run. Who may only be waiting for others says so by the second, so that an endless wait is noticed, and then what it saw:
// the same as last time is no progress.
void yield();
void yield_waiting(const char* name, Site site);
void saw(const void* address, uint64_t value);

// Waits until every lane of `mask` has called this with the same name, mask and line; the last one to come runs `combine` on what all of
// them brought, by lane. Orders no memory, as on a GPU.
using Combine = void (*)(void* const (&brought)[kLanes], uint32_t mask);
void collective(const char* name, uint32_t mask, void* brought, Combine combine, Site site);

// Waits for the lanes of `mask` likewise, and orders memory.
void sync_warp(uint32_t mask, Site site);

// Waits until all threads of the block that have not ended are here, and returns how many brought true. Orders memory.
struct Votes {
  int yes, all;
};
Votes sync_block(const char* name, bool vote, Site site);

// Orders memory among threads that call it.
void fence();

// The block's dynamic shared memory: as large as launched, to the byte, and at first full of bytes that make no sense.
uint8_t* shared_memory();
bool is_shared(const void* address, std::size_t bytes);

// Copies 16 bytes of which `bytes` are read, no earlier than they are committed and no later than they are waited for; until then the
// target holds bytes that make no sense.
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace bitmask::twin
