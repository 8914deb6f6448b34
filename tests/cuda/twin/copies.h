// Asynchronous copies of a thread, between copies.cpp, which does them, and scheduler.cpp, which knows the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bitmask::twin {

struct Copy {
  uint8_t* shared;
  const uint8_t* global;
  std::size_t bytes;
  int64_t group;
};

struct Copies {
  std::vector<Copy> waiting;  // oldest first
  int64_t group = 0;          // that new copies belong to; earlier ones are committed
};

Copies& copies();      // of the thread that runs
void finish_copies();  // all of them
bool copies_early();   // whether those just committed are done at once
int senseless_byte();

}  // namespace bitmask::twin
