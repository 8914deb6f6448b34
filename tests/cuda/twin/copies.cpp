// cp.async: a thread keeps its copies in a queue. ThreadSanitizer watches the copying, as done by the thread that waits.
#include "copies.h"

#include <cstring>

#include "twin.h"

namespace bitmask::twin {
namespace {

// Does the copies of groups before `end`.
void do_copies(int64_t end) {
  std::vector<Copy>& waiting = copies().waiting;
  std::size_t done = 0;
  while (done < waiting.size() && waiting[done].group < end) {
    const Copy& copy = waiting[done++];
    if (copy.bytes != 0) std::memcpy(copy.shared, copy.global, copy.bytes);
    std::memset(copy.shared + copy.bytes, 0, 16 - copy.bytes);
  }
  waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<std::size_t>(shared) % 16 != 0) fail("cp.async: target %p is not aligned to 16 bytes", shared);
  if (reinterpret_cast<std::size_t>(global) % 16 != 0) fail("cp.async: source %p is not aligned to 16 bytes", global);
  if (bytes < 0 || bytes > 16) fail("cp.async: reads %d bytes", bytes);
  if (!is_shared(shared, 16)) fail("cp.async: target %p is outside of the block's shared memory", shared);
  const std::size_t size = static_cast<std::size_t>(bytes);
  if (size != 0) std::memcpy(shared, global, size);  // for a sanitizer to find and name the caller
  asm volatile("" ::: "memory");
  std::memset(shared, senseless_byte(), 16);
  copies().waiting.push_back({static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), size, copies().group});
}

void copy_async_commit() {
  ++copies().group;
  if (copies_early()) do_copies(copies().group);
}

void copy_async_wait(int pending) {
  do_copies(copies().group - pending);
  yield();
}

void finish_copies() {
  do_copies(copies().group + 1);
  copies().group = 0;
}

}  // namespace bitmask::twin
