// Stacks to run on, and the switch from one to another, which the sanitizers are told of. ThreadSanitizer takes each stack for a thread;
// what one does before another is ordered by acquire and release alone, never by the switch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitmask::twin {

struct Stack {
  void* top = nullptr;      // while it does not run
  uint8_t* base = nullptr;  // lowest address
  std::size_t bytes = 0;
  void* thread = nullptr;  // of ThreadSanitizer
};

// A stack that begins with `entry` when first switched to; `entry` calls entered() first and never returns. It is never freed. The page
// below is out of bounds.
Stack make_stack(void (*entry)());
void entered();

// The stack that this is called on.
Stack this_stack();

void switch_stack(Stack& from, const Stack& to);

#if defined(__SANITIZE_THREAD__)
#define BITMASK_TWIN_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define BITMASK_TWIN_TSAN
#endif
#endif

#if defined(BITMASK_TWIN_TSAN)
constexpr bool kWatchesRaces = true;

// What was done before a release of an object happened before what is done after a later acquire of it.
void acquire(void* object);
void release(void* object);

// Accesses during the life of such an object are the scheduler's own and no races.
struct Unwatched {
  Unwatched();
  ~Unwatched();
};
#else
constexpr bool kWatchesRaces = false;
inline void acquire(void*) {}
inline void release(void*) {}
struct Unwatched {
  Unwatched() {}
  ~Unwatched() {}
};
#endif

}  // namespace bitmask::twin
