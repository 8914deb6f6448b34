// mbarriers, copies of boxes and multiplications by warpgroups, between warpgroup.cpp, which does them, scheduler.cpp, which knows the
// thread, and ptx_warpgroup.cuh, which has them as instructions.
//
// What is asynchronous is done as early or as late as may be, drawn for each launch: a copy when it is asked for, or when somebody waits
// for it; a multiplication reads its operands when it is committed, or when it is waited for. Until then the target of a copy, and sums
// until they are waited for, hold what makes no sense.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

#include "twin.h"

namespace bitmask::twin {

// ---------------------------------------------------------------------------------------------------------------- mbarriers

void barrier_init(uint64_t* barrier, uint32_t arrivals);
void barrier_arrive(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity, Site site);  // until the phase of this parity is over

// ---------------------------------------------------------------------------------------------------------------- copies

void copy_box(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier);

// ---------------------------------------------------------------------------------------------------------------- multiplications

using Widen = float (*)(uint16_t);

// A multiplication as one thread of the warpgroup has it: it makes its own sums.
struct Multiplication {
  uint64_t a, b;  // descriptors
  bool transposed_a, transposed_b;
  Widen widen;
  int64_t group;
};

struct Multiplications {
  std::vector<Multiplication> waiting;  // oldest first
  int64_t group = 0;                    // that new ones belong to
  bool fenced = false;                  // since they were last committed
  float* target = nullptr;              // of those that wait
  std::vector<float> sums;              // what it will hold
};
Multiplications& multiplications();  // of the thread that runs

void multiply_fence();
void multiply(float* d, int sums, const Multiplication& multiplication);
void multiply_commit();
void multiply_wait(int pending);

void finish_multiplications();  // of a thread that ends: fails if there are any
void finish_warpgroups();       // of a launch: fails if a copy is under way, or if warps of a warpgroup did not multiply together

// ---------------------------------------------------------------------------------------------------------------- of the scheduler

void park(const void* place, const char* name, Site site);  // until somebody calls unpark with the same place
void unpark(const void* place);

}  // namespace bitmask::twin
