// Runs CUDA kernels on the CPU so that a test without a GPU meets what a GPU may do. Every CUDA thread is a fiber: a stack of its own,
// run until it waits for others. Which fiber runs next is drawn from a seeded generator, several blocks are resident at a time and start
// in any order, so interleavings differ from seed to seed and can be replayed.
//
//   launch --> blocks (grid, shuffled) --> up to 8 resident --> a fiber per thread --> `runnable` --> one runs
//                                                                                          ^            |
//                                                             collective, barrier complete |            v waits, yields
//
// Switch points: collectives of a warp, barriers, atomics, acquire and release, pauses. Errors end the process with a report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace bitmask::twin {

// ---------------------------------------------------------------------------------------------------------------- for tests

// Begins another sequence of schedules. The environment variable BITMASK_TWIN_SEED, where set, takes the place of `number`.
void seed(uint64_t number);

// What the device is said to be. Reset by assigning {}.
struct Properties {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // that one block may have if it asks for them
  int major = 9, minor = 0;
};
inline Properties properties;

// ---------------------------------------------------------------------------------------------------------------- for the headers

constexpr int kLanes = 32;

// Where something is called: as a last parameter that has this default.
struct Site {
  const char* file;
  int line;
};
constexpr Site site_of(const char* file, int line) { return {file, line}; }
#define BITMASK_TWIN_SITE ::bitmask::twin::Site site = ::bitmask::twin::site_of(__builtin_FILE(), __builtin_LINE())

// Indices of the thread that runs.
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

// Ends the process with a report that names the thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

int lane();

// Lets any other thread run. A thread that only waits for others says so, so that an endless wait is noticed.
enum class Yield { kWorking, kWaiting };
void yield(Yield yield);

// Waits until every lane of `mask` has called this with the same name, mask and site; the last one to come runs `combine` on what all of
// them brought, by lane; null for lanes outside of the mask.
using Combine = void (*)(void* const (&brought)[kLanes], uint32_t mask);
void collective(const char* name, uint32_t mask, void* brought, Combine combine, Site site);

// Waits until all threads of the block that have not ended are here, and returns how many brought true.
struct Votes {
  int yes, all;
};
Votes barrier(const char* name, bool vote, Site site);

// The block's dynamic shared memory: exactly as large as launched, filled with bytes that make no sense.
uint8_t* shared_memory();
bool is_shared(const void* address, std::size_t bytes);

// 16 bytes from global memory, of which `bytes` are read, copied no earlier than when it is committed and no later than waited for.
// Until then the target holds bytes that make no sense.
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace bitmask::twin
