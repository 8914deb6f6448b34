// What the tests of the CUDA kernels share. A test file registers its families, and errors planted to be found, by itself:
//
//   TEST_FAMILY(codec) { ... check(...); ... }                       run by default, alone by --only codec
//   PLANTED_ERROR(reads_past, "heap-buffer-overflow") { ... }        run by --plant reads_past, must end with such a report
//
// Tests run on the CPU, and once more under each sanitizer; a planted error whose report begins with ThreadSanitizer runs under that one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../native/testing.h"
#include "stack.h"
#include "twin.h"

namespace bitmask::testing {

struct Registered {
  const char* name;
  const char* report;  // of a planted error, a pattern of grep; null for families
  void (*run)();
};

inline std::vector<Registered>& registry() {
  static std::vector<Registered> all;
  return all;
}

struct Registration {
  explicit Registration(const Registered& what) { registry().push_back(what); }
};

#define BITMASK_REGISTER(name, report, function)                                                    \
  static void function();                                                                           \
  static const ::bitmask::testing::Registration function##_registration({#name, report, function}); \
  static void function()
#define TEST_FAMILY(name) BITMASK_REGISTER(name, nullptr, test_##name)
#define PLANTED_ERROR(name, report) BITMASK_REGISTER(name, report, plant_##name)

// Begins the schedule and the random data that belong to a number.
inline void begin_seed(uint64_t number) {
  twin::seed(number);
  random_state = (number + 1) * 0x9e3779b97f4a7c15;
}

// Runs `test` with as many schedules and random data, or with those that BITMASK_TWIN_SEED asks for. ThreadSanitizer, which is slow, finds
// a race in almost any schedule and has fewer.
template <typename Test>
void for_each_seed(uint64_t count, const Test& test) {
  const std::string before = place;
  const char* only = std::getenv("BITMASK_TWIN_SEED");
  const uint64_t first = only != nullptr ? std::strtoull(only, nullptr, 10) : 0;
  const uint64_t seeds = only != nullptr ? 1 : twin::kWatchesRaces ? (count + 3) / 4 : count;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    begin_seed(seed);
    place = before + " seed " + std::to_string(seed);
    test();
  }
  place = before;
}

}  // namespace bitmask::testing
