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

// Runs `test` with as many schedules, or with the one that BITMASK_TWIN_SEED asks for.
template <typename Test>
void for_each_seed(int count, const Test& test) {
  const std::string before = place;
  const char* only = std::getenv("BITMASK_TWIN_SEED");
  for (int i = 0; i < (only != nullptr ? 1 : count); ++i) {
    twin::seed(static_cast<uint64_t>(i));
    place = before + " seed " + (only != nullptr ? only : std::to_string(i));
    test();
  }
  place = before;
}

}  // namespace bitmask::testing
