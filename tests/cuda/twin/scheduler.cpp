// Fibers, warps and blocks (twin.h has the idea). A fiber that waits is in no list; who completes what it waits for makes it runnable.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "copies.h"
#include "stack.h"
#include "twin.h"
#include "warpgroup.h"

namespace bitmask::twin {
namespace {

// ---------------------------------------------------------------------------------------------------------------- state

struct Block;
struct Warp;

// A stack and the thread that it serves, one after another.
struct Fiber {
  Stack stack;

  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  uint3 index = {};

  // What it waits in, or was in last.
  bool waits = false;
  const char* name = nullptr;
  Site site = {};
  void* brought = nullptr;  // to the collective
  Votes votes = {};         // of the barrier

  const void* seen_at = nullptr;  // by its last atomic or acquire
  uint64_t seen = 0;

  Copies copies;
  Multiplications multiplications;
};

// A collective that waits for lanes.
struct Pending {
  const char* name;
  uint32_t mask;
  Site site;
  uint32_t arrived;  // lanes
  char* order;       // for acquire and release
};

struct Warp {
  Fiber* fibers[kLanes] = {};
  uint32_t present = 0;  // lanes that have not ended
  std::vector<Pending> pending;
  bool polled = false;  // since its last collective
  char orders[64];      // taken in turn, more than collectives are under way
  unsigned int next_order = 0;
};

struct Block {
  uint3 index = {};
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  int present = 0;  // threads that have not ended
  std::vector<Fiber*> at_barrier;
  int yes = 0;              // of those at the barrier
  char orders[2];           // of even and odd barriers: who is late at one shall not acquire what others did on their way to the next
  unsigned int opened = 0;  // barriers
  uint8_t* shared = nullptr;
};

struct Launch {
  const std::function<void()>* thread;
  std::size_t shared_bytes;
  int pattern;                  // of bytes that make no sense: all NaN, or large numbers
  uint64_t wandering;           // in one of so many choices any runnable fiber goes on; otherwise the one that became runnable last
  bool copies_late;             // asynchronous copies are done when waited for; otherwise some are when committed
  std::vector<uint64_t> order;  // of blocks
  std::size_t started = 0;
  std::vector<std::unique_ptr<Block>> resident;
};

constexpr uint64_t kMostResident = 8;
constexpr uint64_t kMostFibers = kWatchesRaces ? 512 : 8192;  // ThreadSanitizer becomes slow with more
constexpr uint64_t kEndless = 2'000'000;                      // yields in a row of threads that wait

Fiber host;  // the caller of the kernel
Fiber* current = &host;
std::vector<Fiber*> runnable;
std::vector<std::pair<const void*, Fiber*>>& parked = *new std::vector<std::pair<const void*, Fiber*>>;  // and what for
std::vector<Fiber*>& idle = *new std::vector<Fiber*>;  // stacks without a thread, kept to the end of the process
Launch* running = nullptr;
char begin_order, end_order;  // host to threads, threads to host
char fence_order;
uint64_t yields_waiting = 0;  // since something was done

uint64_t seed_number = 0;
uint64_t random_state = 0x9e3779b97f4a7c15;

uint64_t random_below(uint64_t bound) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1d >> 32) * bound >> 32;
}

// ---------------------------------------------------------------------------------------------------------------- reports

unsigned long long seed_printed() { return seed_number; }

int warp_number(const Fiber* fiber) { return static_cast<int>(fiber->warp - fiber->block->warps.data()); }

// What the threads of a warp are doing, one line for all lanes that do the same.
void report_warp(const Warp& warp) {
  for (uint32_t left = warp.present; left != 0;) {
    const Fiber* first = warp.fibers[__builtin_ctz(left)];
    uint32_t same = 0;
    for (uint32_t lanes = left; lanes != 0; lanes &= lanes - 1) {
      const Fiber* other = warp.fibers[__builtin_ctz(lanes)];
      if (other->waits == first->waits && other->name == first->name && other->site.line == first->site.line) same |= 1u << other->lane;
    }
    left &= ~same;
    const uint3 b = first->block->index;
    std::fprintf(stderr, "  block (%u, %u, %u) warp %d lanes %08x %s ", b.x, b.y, b.z, warp_number(first), same,
                 first->waits ? "wait in" : "run, and were last in");
    std::fprintf(stderr, "%s at %s:%d\n", first->name != nullptr ? first->name : "nothing", first->site.file, first->site.line);
  }
}

[[noreturn]] void report_standstill(const char* what) {
  std::fprintf(stderr, "twin: seed %llu: %s\n", seed_printed(), what);
  for (const auto& block : running->resident) {
    for (const Warp& warp : block->warps) report_warp(warp);
  }
  std::abort();
}

// ---------------------------------------------------------------------------------------------------------------- switching

void switch_to(Fiber* next) {
  if (next == current) return;
  Fiber* self = current;
  current = next;
  thread_index = next->index;
  if (next->block != nullptr) block_index = next->block->index;
  switch_stack(self->stack, next->stack);
}

void make_runnable(Fiber* fiber) {
  fiber->waits = false;
  runnable.push_back(fiber);
}

Fiber* take_runnable(std::size_t position) {
  Fiber* fiber = runnable[position];
  runnable[position] = runnable.back();
  runnable.pop_back();
  return fiber;
}

// Another fiber runs, or this one if it has been made runnable.
void run_another() {
  if (runnable.empty()) report_standstill("deadlock, every thread waits");
  const bool wanders = random_below(running->wandering) == 0;
  switch_to(take_runnable(wanders ? random_below(runnable.size()) : runnable.size() - 1));
}

// Any runnable fiber runs, or this one: whoever waits by asking again and again holds up nobody.
void run_any() {
  make_runnable(current);
  switch_to(take_runnable(random_below(runnable.size())));
}

// ---------------------------------------------------------------------------------------------------------------- threads and blocks

void open_barrier(Block* block) {
  yields_waiting = 0;
  const Votes votes{block->yes, static_cast<int>(block->at_barrier.size())};
  for (Fiber* fiber : block->at_barrier) {
    fiber->votes = votes;
    make_runnable(fiber);
  }
  block->at_barrier.clear();
  block->yes = 0;
  ++block->opened;
}

void end_thread() {
  Warp* warp = current->warp;
  Block* block = current->block;
  yields_waiting = 0;
  for (const Pending& other : warp->pending) {
    if ((other.mask >> current->lane & 1) == 0) continue;
    fail("ends; lanes %08x wait for it in %s with mask %08x at %s:%d", other.arrived, other.name, other.mask, other.site.file,
         other.site.line);
  }
  warp->present &= ~(1u << current->lane);
  if (--block->present == 0) {
    switch_to(&host);
  } else {
    if (static_cast<int>(block->at_barrier.size()) == block->present) open_barrier(block);
    run_another();
  }
}

[[noreturn]] void serve_threads() {
  entered();
  for (;;) {
    acquire(&begin_order);
    (*running->thread)();
    finish_copies();
    finish_multiplications();
    release(&end_order);
    const Unwatched unwatched;
    end_thread();
  }
}

Fiber* take_idle() {
  if (idle.empty()) {
    idle.push_back(new Fiber);
    idle.back()->stack = make_stack(serve_threads);
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

uint3 position(uint64_t number, const dim3& size) {
  return {static_cast<unsigned int>(number % size.x), static_cast<unsigned int>(number / size.x % size.y),
          static_cast<unsigned int>(number / size.x / size.y)};
}

void start_block() {
  auto block = std::make_unique<Block>();
  block->index = position(running->order[running->started++], grid_size);
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, running->shared_bytes) != 0) fail("no memory for a block");
  block->shared = static_cast<uint8_t*>(shared);
  std::memset(block->shared, running->pattern, running->shared_bytes);
  block->present = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block->warps.resize(static_cast<std::size_t>(block->present + kLanes - 1) / kLanes);
  for (int thread = 0; thread < block->present; ++thread) {
    Fiber* fiber = take_idle();
    fiber->block = block.get();
    fiber->warp = &block->warps[static_cast<std::size_t>(thread / kLanes)];
    fiber->lane = thread % kLanes;
    fiber->index = position(static_cast<uint64_t>(thread), block_size);
    fiber->name = nullptr;
    fiber->site = {"", 0};
    fiber->seen_at = nullptr;
    fiber->warp->fibers[fiber->lane] = fiber;
    fiber->warp->present |= 1u << fiber->lane;
    block->fibers.push_back(fiber);
  }
  const std::size_t first = random_below(block->fibers.size());
  for (std::size_t i = 0; i < block->fibers.size(); ++i) make_runnable(block->fibers[(first + i) % block->fibers.size()]);
  running->resident.push_back(std::move(block));
}

void end_blocks() {
  for (std::size_t i = running->resident.size(); i-- > 0;) {
    Block* block = running->resident[i].get();
    if (block->present != 0) continue;
    idle.insert(idle.end(), block->fibers.begin(), block->fibers.end());
    std::free(block->shared);
    running->resident.erase(running->resident.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (random_below(2) == 0) return order;
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

// ---------------------------------------------------------------------------------------------------------------- collectives

bool same_call(const char* name, Site site, const char* other_name, Site other_site) {
  return site.line == other_site.line && (name == other_name || std::strcmp(name, other_name) == 0);
}

// The pending collective that this lane's call belongs to, begun if it is the first.
Pending* find_pending(const char* name, uint32_t mask, Site site) {
  Warp* warp = current->warp;
  Pending* found = nullptr;
  for (Pending& other : warp->pending) {
    if (other.mask == mask && same_call(name, site, other.name, other.site)) {
      found = &other;
    } else if ((other.mask >> current->lane & 1) != 0 && (other.arrived & mask) != 0) {
      fail("calls %s with mask %08x at %s:%d; lanes %08x wait for it in %s with mask %08x at %s:%d", name, mask, site.file, site.line,
           other.arrived, other.name, other.mask, other.site.file, other.site.line);
    }
  }
  if (found != nullptr) return found;
  warp->pending.push_back({name, mask, site, 0, &warp->orders[warp->next_order++ % sizeof(warp->orders)]});
  return &warp->pending.back();
}

void complete(Pending* pending, Combine combine) {
  Warp* warp = current->warp;
  if (!warp->polled) yields_waiting = 0;
  warp->polled = false;
  if (combine != nullptr) {
    void* brought[kLanes] = {};
    for (uint32_t lanes = pending->mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      brought[lane] = warp->fibers[lane]->brought;
    }
    combine(brought, pending->mask);
  }
  // From any lane on, so that each may be the first to go on.
  const uint64_t first = random_below(kLanes);
  for (uint64_t i = 0; i < kLanes; ++i) {
    const uint64_t lane = (first + i) % kLanes;
    if ((pending->mask >> lane & 1) != 0) make_runnable(warp->fibers[lane]);
  }
  *pending = warp->pending.back();
  warp->pending.pop_back();
}

// Returns what orders the memory of those that were in it.
char* gather(const char* name, uint32_t mask, void* brought, Combine combine, Site site, bool ordered) {
  const Warp* warp = current->warp;
  if ((mask >> current->lane & 1) == 0) fail("calls %s with mask %08x, which it is not in, at %s:%d", name, mask, site.file, site.line);
  if ((mask & ~warp->present) != 0) {
    fail("calls %s with mask %08x at %s:%d; lanes %08x have ended or never were", name, mask, site.file, site.line, mask & ~warp->present);
  }
  Pending* pending = find_pending(name, mask, site);
  char* order = pending->order;
  if (ordered) release(order);
  pending->arrived |= 1u << current->lane;
  current->waits = true;
  current->name = name;
  current->site = site;
  current->brought = brought;
  if (pending->arrived == mask) complete(pending, combine);
  run_another();
  return order;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------- for tests

void seed(uint64_t number) {
  const char* replayed = std::getenv("BITMASK_TWIN_SEED");
  seed_number = replayed != nullptr ? std::strtoull(replayed, nullptr, 10) : number;
  random_state = (seed_number + 1) * 0x9e3779b97f4a7c15;
  for (int i = 0; i < 8; ++i) random_below(1);
}

// ---------------------------------------------------------------------------------------------------------------- for the headers

void run_grid(const dim3& grid, const dim3& block, std::size_t shared_bytes, const std::function<void()>& thread) {
  constexpr uint64_t kWandering[] = {1, 8, 64};
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  grid_size = grid;
  block_size = block;
  Launch launch{};
  launch.thread = &thread;
  launch.shared_bytes = shared_bytes;
  launch.pattern = random_below(2) == 0 ? 0xff : 0x7f;
  launch.wandering = kWandering[random_below(3)];
  launch.copies_late = random_below(2) == 0;
  launch.order = block_order(uint64_t{grid.x} * grid.y * grid.z);
  uint64_t resident = 1 + random_below(kMostResident);
  while (resident > 2 && resident * threads > kMostFibers) --resident;
  if (host.stack.base == nullptr) host.stack = this_stack();
  running = &launch;
  yields_waiting = 0;
  release(&begin_order);
  {
    const Unwatched unwatched;
    for (;;) {
      while (launch.resident.size() < resident && launch.started < launch.order.size()) start_block();
      if (launch.resident.empty()) break;
      run_another();  // back here when the last thread of a block has ended
      end_blocks();
    }
    finish_warpgroups();
    running = nullptr;
  }
  acquire(&end_order);
}

bool in_kernel() { return current != &host; }

void fail(const char* format, ...) {
  const Unwatched unwatched;
  std::fprintf(stderr, "twin: ");
  if (in_kernel()) {
    std::fprintf(stderr, "seed %llu: block (%u, %u, %u) warp %d lane %d: ", seed_printed(), block_index.x, block_index.y, block_index.z,
                 warp_number(current), current->lane);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

int lane() {
  const Unwatched unwatched;
  return current->lane;
}

void yield() {
  const Unwatched unwatched;
  yields_waiting = 0;
  run_any();
}

void yield_waiting(const char* name, Site site) {
  const Unwatched unwatched;
  current->name = name;
  current->site = site;
  current->warp->polled = true;
  if (++yields_waiting > kEndless) report_standstill("endless wait, threads ask for what nobody does");
  run_any();
}

void saw(const void* address, uint64_t value) {
  const Unwatched unwatched;
  if (current->seen_at != address || current->seen != value) yields_waiting = 0;
  current->seen_at = address;
  current->seen = value;
}

void collective(const char* name, uint32_t mask, void* brought, Combine combine, Site site) {
  const Unwatched unwatched;
  gather(name, mask, brought, combine, site, false);
}

void sync_warp(uint32_t mask, Site site) {
  const Unwatched unwatched;
  acquire(gather("__syncwarp", mask, nullptr, nullptr, site, true));
}

Votes sync_block(const char* name, bool vote, Site site) {
  const Unwatched unwatched;
  Block* block = current->block;
  if (!block->at_barrier.empty()) {
    const Fiber* other = block->at_barrier.front();
    if (!same_call(name, site, other->name, other->site)) {
      fail("calls %s at %s:%d; other threads of the block wait in %s at %s:%d", name, site.file, site.line, other->name, other->site.file,
           other->site.line);
    }
  }
  char* order = &block->orders[block->opened % 2];
  release(order);
  current->waits = true;
  current->name = name;
  current->site = site;
  block->yes += vote;
  block->at_barrier.push_back(current);
  if (static_cast<int>(block->at_barrier.size()) == block->present) open_barrier(block);
  run_another();
  acquire(order);
  return current->votes;
}

void fence() {
  acquire(&fence_order);
  release(&fence_order);
}

void park(const void* place, const char* name, Site site) {
  const Unwatched unwatched;
  current->waits = true;
  current->name = name;
  current->site = site;
  parked.emplace_back(place, current);
  run_another();
}

void unpark(const void* place) {
  const Unwatched unwatched;
  yields_waiting = 0;
  for (std::size_t i = parked.size(); i-- > 0;) {
    if (parked[i].first != place) continue;
    make_runnable(parked[i].second);
    parked.erase(parked.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

uint8_t* shared_memory() {
  const Unwatched unwatched;
  return current->block->shared;
}

bool is_shared(const void* address, std::size_t bytes) {
  const Unwatched unwatched;
  const std::size_t offset = reinterpret_cast<std::size_t>(address) - reinterpret_cast<std::size_t>(current->block->shared);
  return offset <= running->shared_bytes && bytes <= running->shared_bytes - offset;
}

Copies& copies() {
  const Unwatched unwatched;
  return current->copies;
}

Multiplications& multiplications() {
  const Unwatched unwatched;
  return current->multiplications;
}

int senseless_byte() {
  const Unwatched unwatched;
  return running->pattern;
}

bool copies_early() {
  const Unwatched unwatched;
  return !running->copies_late && random_below(2) == 0;
}

}  // namespace bitmask::twin
