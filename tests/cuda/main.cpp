// The program of all CUDA tests: main [--only FAMILY | --families | --plant ERROR | --planted]. --families and --planted list what there
// is, the latter with the reports that are expected.
#include <cstdio>
#include <cstring>

#include "testing.h"

namespace bitmask::testing {
namespace {

int run_families(const char* only) {
  int families = 0;
  for (const Registered& test : registry()) {
    if (test.report != nullptr || (only != nullptr && std::strcmp(only, test.name) != 0)) continue;
    const int64_t before = passed;
    place = test.name;
    begin_seed(0);
    test.run();
    std::printf("%s: %" PRId64 " checks passed\n", test.name, passed - before);
    std::fflush(stdout);
    ++families;
  }
  if (families == 0) std::printf("no such family\n");
  if (failed != 0) std::printf("%" PRId64 " checks FAILED\n", failed);
  return failed == 0 && families != 0 ? 0 : 1;
}

int plant(const char* name) {
  for (const Registered& error : registry()) {
    if (error.report == nullptr || std::strcmp(name, error.name) != 0) continue;
    place = name;
    begin_seed(0);
    error.run();
    return failed == 0 ? 0 : 1;
  }
  std::printf("no such planted error\n");
  return 2;
}

int list(bool planted) {
  for (const Registered& entry : registry()) {
    if (planted && entry.report != nullptr) std::printf("%s\t%s\n", entry.name, entry.report);
    if (!planted && entry.report == nullptr) std::printf("%s\n", entry.name);
  }
  return 0;
}

}  // namespace
}  // namespace bitmask::testing

int main(int count, char** arguments) {
  using namespace bitmask::testing;
  if (count == 1) return run_families(nullptr);
  if (count == 3 && std::strcmp(arguments[1], "--only") == 0) return run_families(arguments[2]);
  if (count == 3 && std::strcmp(arguments[1], "--plant") == 0) return plant(arguments[2]);
  if (count == 2 && std::strcmp(arguments[1], "--planted") == 0) return list(true);
  if (count == 2 && std::strcmp(arguments[1], "--families") == 0) return list(false);
  std::printf("usage: %s [--only FAMILY | --families | --plant ERROR | --planted]\n", arguments[0]);
  return 2;
}
