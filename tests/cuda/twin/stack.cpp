#include "stack.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define BITMASK_TWIN_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BITMASK_TWIN_ASAN
#endif
#endif

#if defined(BITMASK_TWIN_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(BITMASK_TWIN_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// Puts the registers that a call preserves onto the stack, the stack's top into *from, and goes on with the stack `to`.
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
)");
constexpr int kSavedWords = 8;  // six registers, the address to go on at, and a word so that `entry` finds the stack aligned
constexpr int kAddressWord = 6;
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
constexpr int kAddressWord = 11;  // x30
#else
#error "bitmask_twin_switch is missing for this architecture"
#endif

namespace bitmask::twin {
namespace {

#if defined(BITMASK_TWIN_ASAN) || defined(BITMASK_TWIN_TSAN)
constexpr std::size_t kBytes = 256 * 1024;  // frames are larger, and reports are written on this stack
#else
constexpr std::size_t kBytes = 64 * 1024;
#endif
constexpr std::size_t kPage = 64 * 1024;  // the largest of any supported system

}  // namespace

Stack make_stack(void (*entry)()) {
  void* memory = mmap(nullptr, kPage + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    std::perror("twin: no memory for another stack");
    std::abort();
  }
  Stack stack;
  stack.base = static_cast<uint8_t*>(memory) + kPage;
  stack.bytes = kBytes;
  void** top = reinterpret_cast<void**>(stack.base + kBytes) - kSavedWords;
  top[kAddressWord] = reinterpret_cast<void*>(entry);
  stack.top = top;
#if defined(BITMASK_TWIN_TSAN)
  stack.thread = __tsan_create_fiber(0);
#endif
  return stack;
}

void entered() {
#if defined(BITMASK_TWIN_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

Stack this_stack() {
  Stack stack;
  pthread_attr_t attributes;
  void* base = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
  pthread_attr_getstack(&attributes, &base, &stack.bytes);
  pthread_attr_destroy(&attributes);
  stack.base = static_cast<uint8_t*>(base);
#if defined(BITMASK_TWIN_TSAN)
  stack.thread = __tsan_get_current_fiber();
#endif
  return stack;
}

void switch_stack(Stack& from, const Stack& to) {
#if defined(BITMASK_TWIN_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.base, to.bytes);
#endif
#if defined(BITMASK_TWIN_TSAN)
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
  bitmask_twin_switch(&from.top, to.top);
#if defined(BITMASK_TWIN_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

#if defined(BITMASK_TWIN_TSAN)
void acquire(void* object) { __tsan_acquire(object); }
void release(void* object) { __tsan_release(object); }

Unwatched::Unwatched() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unwatched::~Unwatched() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#endif

}  // namespace bitmask::twin

#if defined(BITMASK_TWIN_TSAN)
extern "C" const char* __tsan_default_options() { return "halt_on_error=1:report_signal_unsafe=0"; }
#endif
