#include "twin.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BITMASK_TWIN_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define BITMASK_TWIN_ASAN
#endif
#if defined(BITMASK_TWIN_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must preserve on this stack, its top in *from, and goes on from the stack `to`.
extern "C" void bitmask_twin_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl bitmask_twin_switch
.type bitmask_twin_switch, @function
bitmask_twin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bitmask_twin_switch, .-bitmask_twin_switch
.section .note.GNU-stack, "", @progbits
.text
)");
constexpr int kSavedWords = 8;  // six registers, the address to return to, and a word that aligns the stack of what is entered
constexpr int kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl bitmask_twin_switch
.type bitmask_twin_switch, %function
bitmask_twin_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size bitmask_twin_switch, .-bitmask_twin_switch
)");
constexpr int kSavedWords = 20;
constexpr int kReturnWord = 11;
#else
#error "bitmask_twin_switch is missing for this architecture"
#endif

namespace bitmask::twin {
namespace {

// ---------------------------------------------------------------------------------------------------------------- what is scheduled

struct Block;
struct Warp;

struct Copy {
  uint8_t* shared;
  const uint8_t* global;
  int bytes;
  int64_t group;
};

// A thread's stack and what it waits for. Stacks are kept and serve one thread after another.
struct Fiber {
  void* top = nullptr;  // of the stack while it does not run
  uint8_t* stack = nullptr;
  std::size_t stack_bytes = 0;

  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  uint3 index = {};

  const char* waits_in = nullptr;  // collective or barrier; null: it may run
  uint32_t mask = 0;               // of the collective
  Site site = {};
  void* brought = nullptr;
  Votes votes = {};

  std::vector<Copy> copies;  // asynchronous, not done yet, oldest first
  int64_t group = 0;         // that copies are put into; those before are committed
};

struct Warp {
  Fiber* fibers[kLanes] = {};
  uint32_t present = 0;  // lanes that have not ended
  uint32_t waiting = 0;  // in a collective
  // Collectives that wait for lanes, by the lowest lane of their masks, which are disjoint: who is there.
  uint32_t arrived[kLanes] = {};
};

struct Block {
  uint3 index = {};
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  int present = 0;  // threads that have not ended
  std::vector<Fiber*> at_barrier;
  int yes = 0;
  uint8_t* shared = nullptr;
};

struct Launch {
  const std::function<void()>* thread;
  std::size_t shared_bytes;
  uint8_t pattern;              // what shared memory holds until something is written there
  uint64_t wandering;           // one choice out of so many is any runnable fiber, the others are the one last made runnable
  bool late_copies;             // asynchronous copies are not done before they are waited for
  std::vector<uint64_t> order;  // of the blocks
  std::size_t next = 0;         // block to start
  std::vector<std::unique_ptr<Block>> resident;
};

constexpr std::size_t kPage = 4096;
#if defined(BITMASK_TWIN_ASAN)
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif
constexpr int kMostResident = 8;
constexpr uint64_t kEndless = 20'000'000;  // yields of waiting threads with nothing done in between

Fiber host;  // the caller of launch
Fiber* current = &host;
std::vector<Fiber*>& idle = *new std::vector<Fiber*>;  // stacks without a thread, kept to the end of the process
std::vector<Fiber*> runnable;
Launch* running = nullptr;
uint64_t waits = 0;  // of waiting threads since something was last done

uint64_t seed_number = 0;
uint64_t random_state = 1;

uint64_t random_word() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1d;
}

uint64_t random_below(uint64_t bound) { return (random_word() >> 32) * bound >> 32; }

// ---------------------------------------------------------------------------------------------------------------- fibers

void switch_to(Fiber* next) {
  Fiber* self = current;
  if (next == self) return;
  current = next;
  thread_index = next->index;
  if (next->block != nullptr) block_index = next->block->index;
#if defined(BITMASK_TWIN_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next->stack, next->stack_bytes);
#endif
  bitmask_twin_switch(&self->top, next->top);
#if defined(BITMASK_TWIN_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void end_thread();

[[noreturn]] void serve_threads() {
#if defined(BITMASK_TWIN_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    (*running->thread)();
    end_thread();
  }
}

Fiber* take_fiber() {
  if (!idle.empty()) {
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }
  Fiber* fiber = new Fiber;
  void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fail("no memory for another stack");
  fiber->stack = static_cast<uint8_t*>(memory) + kPage;
  fiber->stack_bytes = kStackBytes;
  void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - kSavedWords;
  top[kReturnWord] = reinterpret_cast<void*>(&serve_threads);
  fiber->top = top;
  return fiber;
}

void make_runnable(Fiber* fiber) {
  fiber->waits_in = nullptr;
  runnable.push_back(fiber);
}

Fiber* take_runnable(std::size_t position) {
  Fiber* fiber = runnable[position];
  runnable[position] = runnable.back();
  runnable.pop_back();
  return fiber;
}

// Prints what every thread is doing, together for the lanes of a warp that do the same.
void report_threads() {
  for (const auto& block : running->resident) {
    const uint3 b = block->index;
    for (std::size_t w = 0; w < block->warps.size(); ++w) {
      const Warp& warp = block->warps[w];
      for (uint32_t left = warp.present; left != 0;) {
        const Fiber* first = warp.fibers[__builtin_ctz(left)];
        uint32_t same = 0;
        for (uint32_t lanes = left; lanes != 0; lanes &= lanes - 1) {
          const Fiber* other = warp.fibers[__builtin_ctz(lanes)];
          const bool alike = other->waits_in == first->waits_in && other->mask == first->mask && other->site.line == first->site.line;
          if (alike || (other->waits_in == nullptr && first->waits_in == nullptr)) same |= 1u << other->lane;
        }
        left &= ~same;
        std::fprintf(stderr, "  block (%u, %u, %u) warp %zu lanes %08x: ", b.x, b.y, b.z, w, same);
        if (first->waits_in == nullptr) {
          std::fprintf(stderr, "run\n");
        } else {
          std::fprintf(stderr, "wait in %s, mask %08x, at %s:%d\n", first->waits_in, first->mask, first->site.file, first->site.line);
        }
      }
    }
  }
}

// Another fiber runs; this one goes on when it has been made runnable and is chosen.
void run_another() {
  if (runnable.empty()) {
    std::fprintf(stderr, "twin: deadlock, seed %llu: all threads wait\n", static_cast<unsigned long long>(seed_number));
    report_threads();
    std::abort();
  }
  const bool wander = random_below(running->wandering) == 0;
  switch_to(take_runnable(wander ? random_below(runnable.size()) : runnable.size() - 1));
}

// Waits in `name` until made runnable.
void wait_in(const char* name, uint32_t mask, Site site) {
  current->waits_in = name;
  current->mask = mask;
  current->site = site;
  run_another();
}

// ---------------------------------------------------------------------------------------------------------------- blocks

void start_block() {
  auto block = std::make_unique<Block>();
  const uint64_t number = running->order[running->next++];
  block->index = {static_cast<unsigned>(number % grid_size.x), static_cast<unsigned>(number / grid_size.x % grid_size.y),
                  static_cast<unsigned>(number / grid_size.x / grid_size.y)};
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, running->shared_bytes) != 0) fail("no memory for a block");
  block->shared = static_cast<uint8_t*>(shared);
  if (running->shared_bytes != 0) std::memset(shared, running->pattern, running->shared_bytes);
  block->present = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block->warps.resize(static_cast<std::size_t>(block->present + kLanes - 1) / kLanes);
  for (int t = 0; t < block->present; ++t) {
    Fiber* fiber = take_fiber();
    const unsigned thread = static_cast<unsigned>(t);
    fiber->block = block.get();
    fiber->warp = &block->warps[static_cast<std::size_t>(t / kLanes)];
    fiber->lane = t % kLanes;
    fiber->index = {thread % block_size.x, thread / block_size.x % block_size.y, thread / block_size.x / block_size.y};
    fiber->group = 0;
    fiber->warp->fibers[fiber->lane] = fiber;
    fiber->warp->present |= 1u << fiber->lane;
    block->fibers.push_back(fiber);
    make_runnable(fiber);
  }
  running->resident.push_back(std::move(block));
}

void end_block(Block* block) {
  idle.insert(idle.end(), block->fibers.begin(), block->fibers.end());
  std::free(block->shared);
  for (auto& place : running->resident) {
    if (place.get() != block) continue;
    std::swap(place, running->resident.back());
    running->resident.pop_back();
    return;
  }
}

void open_barrier(Block* block) {
  waits = 0;
  const Votes votes{block->yes, static_cast<int>(block->at_barrier.size())};
  block->yes = 0;
  for (Fiber* fiber : block->at_barrier) {
    fiber->votes = votes;
    make_runnable(fiber);
  }
  block->at_barrier.clear();
}

void do_copies(int64_t groups) {
  auto& copies = current->copies;
  std::size_t done = 0;
  for (; done < copies.size() && copies[done].group < groups; ++done) {
    const Copy& copy = copies[done];
    std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.bytes));
    std::memset(copy.shared + copy.bytes, 0, static_cast<std::size_t>(16 - copy.bytes));
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

// The thread that runs has returned; its stack waits for another.
void end_thread() {
  Fiber* self = current;
  Warp* warp = self->warp;
  Block* block = self->block;
  waits = 0;
  do_copies(self->group + 1);
  for (uint32_t lanes = warp->waiting; lanes != 0; lanes &= lanes - 1) {
    const Fiber* other = warp->fibers[__builtin_ctz(lanes)];
    if ((other->mask >> self->lane & 1) != 0) {
      fail("ended, while lane %d waits for it in %s, mask %08x, at %s:%d", other->lane, other->waits_in, other->mask, other->site.file,
           other->site.line);
    }
  }
  warp->present &= ~(1u << self->lane);
  --block->present;
  if (block->present == 0) {
    switch_to(&host);
  } else {
    if (static_cast<int>(block->at_barrier.size()) == block->present) open_barrier(block);
    run_another();
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------- for the headers

void fail(const char* format, ...) {
  std::fprintf(stderr, "twin: ");
  va_list arguments;
  if (current != &host) {
    const std::size_t warp = static_cast<std::size_t>(current->warp - current->block->warps.data());
    std::fprintf(stderr, "seed %llu, block (%u, %u, %u) warp %zu lane %d: ", static_cast<unsigned long long>(seed_number), block_index.x,
                 block_index.y, block_index.z, warp, current->lane);
  }
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

int lane() { return current->lane; }

void yield(Yield yield) {
  if (yield == Yield::kWorking) {
    waits = 0;
  } else if (++waits > kEndless) {
    std::fprintf(stderr, "twin: endless wait, seed %llu: threads wait for what nobody does\n",
                 static_cast<unsigned long long>(seed_number));
    report_threads();
    std::abort();
  }
  runnable.push_back(current);
  switch_to(take_runnable(random_below(runnable.size())));
}

void collective(const char* name, uint32_t mask, void* brought, Combine combine, Site site) {
  Fiber* self = current;
  Warp* warp = self->warp;
  if ((mask >> self->lane & 1) == 0) fail("calls %s with mask %08x, which it is not in, at %s:%d", name, mask, site.file, site.line);
  if ((mask & ~warp->present) != 0) {
    fail("calls %s with mask %08x at %s:%d; lanes %08x have ended or never were", name, mask, site.file, site.line, mask & ~warp->present);
  }
  const int first = __builtin_ctz(mask);
  uint32_t& arrived = warp->arrived[first];
  for (uint32_t lanes = warp->waiting & mask; lanes != 0; lanes &= lanes - 1) {
    const Fiber* other = warp->fibers[__builtin_ctz(lanes)];
    if (other->mask == mask && other->site.line == site.line && std::strcmp(other->waits_in, name) == 0) {
      if ((arrived >> other->lane & 1) != 0) break;  // those that came before have been compared
    }
    fail("calls %s with mask %08x at %s:%d; lane %d waits in %s with mask %08x at %s:%d", name, mask, site.file, site.line, other->lane,
         other->waits_in, other->mask, other->site.file, other->site.line);
  }
  self->brought = brought;
  const uint32_t self_bit = 1u << self->lane;
  arrived |= self_bit;
  if (arrived != mask) {
    warp->waiting |= self_bit;
    wait_in(name, mask, site);
    return;
  }
  void* all[kLanes] = {};
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    all[l] = warp->fibers[l]->brought;
  }
  combine(all, mask);
  arrived = 0;
  warp->waiting &= ~mask;
  // From a lane drawn at random on, so that each may be the first to go on.
  const int begin = static_cast<int>(random_below(kLanes));
  for (int i = 0; i < kLanes; ++i) {
    const int l = (begin + i) % kLanes;
    if ((mask >> l & 1) != 0) make_runnable(warp->fibers[l]);
  }
  run_another();
}

Votes barrier(const char* name, bool vote, Site site) {
  Block* block = current->block;
  if (!block->at_barrier.empty()) {
    const Fiber* other = block->at_barrier.front();
    if (other->site.line != site.line || std::strcmp(other->waits_in, name) != 0) {
      fail("calls %s at %s:%d; other threads of the block wait in %s at %s:%d", name, site.file, site.line, other->waits_in,
           other->site.file, other->site.line);
    }
  }
  block->yes += vote;
  block->at_barrier.push_back(current);
  current->waits_in = name;
  current->mask = ~0u;
  current->site = site;
  if (static_cast<int>(block->at_barrier.size()) == block->present) open_barrier(block);
  run_another();
  return current->votes;
}

uint8_t* shared_memory() { return current->block->shared; }

bool is_shared(const void* address, std::size_t bytes) {
  const std::size_t offset = reinterpret_cast<std::size_t>(address) - reinterpret_cast<std::size_t>(shared_memory());
  return offset <= running->shared_bytes && bytes <= running->shared_bytes - offset;
}

void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<std::size_t>(shared) % 16 != 0) fail("copies asynchronously to %p, which is not aligned to 16 bytes", shared);
  if (reinterpret_cast<std::size_t>(global) % 16 != 0) fail("copies asynchronously from %p, which is not aligned to 16 bytes", global);
  if (bytes < 0 || bytes > 16) fail("copies %d bytes asynchronously", bytes);
  if (!is_shared(shared, 16)) fail("copies asynchronously to %p, outside of the block's shared memory", shared);
  uint8_t readable[16];
  std::memcpy(readable, global, static_cast<std::size_t>(bytes));  // now, for AddressSanitizer to name the caller
  std::memset(shared, running->pattern, 16);
  current->copies.push_back({static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes, current->group});
}

void copy_async_commit() {
  ++current->group;
  if (!running->late_copies && random_below(2) == 0) do_copies(current->group);
}

void copy_async_wait(int pending) {
  do_copies(current->group - pending);
  yield(Yield::kWorking);
}

// ---------------------------------------------------------------------------------------------------------------- launching

void seed(uint64_t number) {
  const char* override = std::getenv("BITMASK_TWIN_SEED");
  seed_number = override != nullptr ? std::strtoull(override, nullptr, 10) : number;
  random_state = (seed_number + 1) * 0x9e3779b97f4a7c15;
  for (int i = 0; i < 8; ++i) random_word();
}

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> shared_limits;  // of kernels that asked for more than kShared

constexpr int kShared = 48 * 1024;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  if (kernel == nullptr || config.numAttrs != 0) return cudaErrorInvalidValue;
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const auto raised = shared_limits.find(kernel);
  const int limit = raised == shared_limits.end() ? kShared : raised->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(limit)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (random_below(2) == 0) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  return order;
}

void find_host_stack() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.stack = static_cast<uint8_t*>(stack);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  if (current != &host) fail("launches a kernel");
  const cudaError_t error = check(config, kernel);
  if (error != cudaSuccess) return remember(error);
  if (host.stack == nullptr) find_host_stack();
  block_size = config.blockDim;
  grid_size = config.gridDim;
  Launch launch{};
  launch.thread = &thread;
  launch.shared_bytes = config.dynamicSmemBytes;
  launch.pattern = random_below(2) == 0 ? 0xff : 0x7f;
  constexpr uint64_t kWanderings[] = {1, 8, 64};
  launch.wandering = kWanderings[random_below(3)];
  launch.late_copies = random_below(2) == 0;
  launch.order = block_order(uint64_t{grid_size.x} * grid_size.y * grid_size.z);
  running = &launch;
  waits = 0;
  const std::size_t most = 1 + random_below(kMostResident);
  for (;;) {
    while (launch.resident.size() < most && launch.next < launch.order.size()) start_block();
    if (launch.resident.empty()) break;
    run_another();
    // Back here when the last thread of a block has ended.
    for (std::size_t i = launch.resident.size(); i-- > 0;) {
      if (launch.resident[i]->present == 0) end_block(launch.resident[i].get());
    }
  }
  running = nullptr;
  return cudaSuccess;
}

}  // namespace bitmask::twin

// ---------------------------------------------------------------------------------------------------------------- CUDA runtime

using bitmask::twin::remember;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorUnknown:
      break;
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaPeekAtLastError() { return bitmask::twin::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = bitmask::twin::last_error;
  bitmask::twin::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memcpy(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(target, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = bitmask::twin::kShared;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = bitmask::twin::kLanes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = bitmask::twin::properties.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = bitmask::twin::properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = bitmask::twin::properties.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = bitmask::twin::properties.shared_bytes + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = bitmask::twin::properties.shared_bytes;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return remember(cudaErrorInvalidValue);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > bitmask::twin::properties.shared_bytes) return remember(cudaErrorInvalidValue);
  bitmask::twin::shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, std::size_t shared_bytes) {
  if (threads <= 0 || threads > 1024) return remember(cudaErrorInvalidValue);
  const int by_threads = 2048 / threads;
  const int by_shared = static_cast<int>(static_cast<std::size_t>(bitmask::twin::properties.shared_bytes + 1024) / (shared_bytes + 1024));
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  return cudaSuccess;
}
