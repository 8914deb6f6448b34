// Tests what the twin does of sm_90a against plain loops, and that it notices errors.
#include <ptx_warpgroup.cuh>

#include "../../csrc/cuda/tensor_map.h"
#include "twin_calls.h"

namespace bitmask::testing {
namespace {

namespace ptx = cuda::ptx;

constexpr int kGroup = 128;  // threads

float small(int64_t row, int64_t column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); }

// [rows, cols] of small integers in bf16, which has them exactly.
std::vector<uint16_t> matrix(int64_t rows, int64_t cols) {
  std::vector<uint16_t> elements;
  for (int64_t i = 0; i < rows * cols; ++i) elements.push_back(ptx::float_to_bfloat16(small(i / cols, i % cols)));
  return elements;
}

// A matrix that the copy engine can find.
struct Mapped {
  Buffer memory;
  CUtensorMap map;

  Mapped(int64_t rows, int64_t cols, int box_rows) : memory(rows * cols * 2) {
    std::memcpy(memory.data(), matrix(rows, cols).data(), static_cast<size_t>(rows * cols * 2));
    check(cuda::encode_tensor_map(&map, memory.data(), rows, cols, box_rows) == cudaSuccess, "tensor map");
  }
};

struct Shared {
  uint8_t a[128 * 128], b[128 * 128];
  uint64_t barrier;
};

void begin(Shared& shared, int thread, uint32_t arrivals = 1) {
  if (thread == 0) ptx::barrier_init(&shared.barrier, arrivals);
  ptx::fence_barrier_init();
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------- copies

// Boxes anywhere about a matrix: what is outside is zero, pieces of 16 bytes lie where the swizzle puts them.
void test_copies() {
  constexpr int kRows = 40;
  Mapped source(50, 72, kRows);
  for (const int column : {-8, 0, 5, 64, 80}) {
    for (const int row : {-3, 0, 20, 49, 60}) {
      run_block(
          kGroup,
          [&](int thread) {
            Shared& shared = *ptx::dynamic_shared<Shared>();
            begin(shared, thread);
            if (thread == 0) ptx::barrier_arrive_expect(&shared.barrier, kRows * 128);
            if (thread == 0) ptx::copy_box(shared.a, &source.map, column, row, &shared.barrier);
            ptx::barrier_try_wait(&shared.barrier, 0);
            for (int i = thread; i < kRows * 64; i += kGroup) {
              const int line = i / 64, piece = i % 64 / 8, y = row + line, x = column + i % 64;
              uint16_t got;
              std::memcpy(&got, shared.a + line * 128 + (piece ^ line % 8) * 16 + i % 8 * 2, 2);
              const bool inside = y >= 0 && y < 50 && x >= 0 && x < 72;
              expect(got == (inside ? ptx::float_to_bfloat16(small(y, x)) : 0), "element of a box", i);
            }
          },
          sizeof(Shared));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplications

// One thread's sums of A [64, 64] B [64, 128], each lying along k or, transposed, along its rows and columns, against loops.
template <bool kTransposedA, bool kTransposedB>
void multiply_and_check(Shared& shared, int thread) {
  float d[64];
  for (int i = 0; i < 64; ++i) d[i] = static_cast<float>(i);
  const uint64_t a = ptx::operand_of(shared.a, 8192, 1024), b = ptx::operand_of(shared.b, 8192, 1024);
  ptx::warpgroup_fence();
  for (uint64_t step = 0; step < 4; ++step) {
    ptx::warpgroup_multiply_bfloat16<kTransposedA, kTransposedB>(d, a + step * (kTransposedA ? 128 : 2),
                                                                 b + step * (kTransposedB ? 128 : 2));
  }
  ptx::warpgroup_commit();
  expect(std::isnan(d[5]), "a sum that nobody waited for");
  ptx::warpgroup_wait_for(d);
  for (int i = 0; i < 64; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    float sum = static_cast<float>(i);
    for (int k = 0; k < 64; ++k) {
      sum += (kTransposedA ? small(k, row) : small(row, k)) * (kTransposedB ? small(k, column) : small(column, k));
    }
    expect(d[i] == sum, "sum", i);
  }
}

template <bool kTransposedA, bool kTransposedB>
void test_multiplication() {
  Mapped a(64, 64, 64), b(kTransposedB ? 64 : 128, kTransposedB ? 128 : 64, kTransposedB ? 64 : 128);
  run_block(
      kGroup,
      [&](int thread) {
        Shared& shared = *ptx::dynamic_shared<Shared>();
        begin(shared, thread);
        if (thread == 0) {
          ptx::barrier_arrive_expect(&shared.barrier, 3 * 8192);
          ptx::copy_box(shared.a, &a.map, 0, 0, &shared.barrier);
          ptx::copy_box(shared.b, &b.map, 0, 0, &shared.barrier);
          if (kTransposedB) ptx::copy_box(shared.b + 8192, &b.map, 64, 0, &shared.barrier);
        }
        ptx::barrier_try_wait(&shared.barrier, 0);
        multiply_and_check<kTransposedA, kTransposedB>(shared, thread);
      },
      sizeof(Shared));
}

void test_store_matrix() {
  run_warp(
      [](int lane) {
        uint16_t* const memory = ptx::dynamic_shared<uint16_t>();
        const auto pair = [&](int i) {
          return static_cast<uint32_t>(64 * i + 2 * lane) | static_cast<uint32_t>(64 * i + 2 * lane + 1) << 16;
        };
        const uint32_t r[4] = {pair(0), pair(1), pair(2), pair(3)};  // element c of row r of matrix i is 64 i + 8 r + c
        ptx::store_matrix_x4(memory + 8 * lane, r);
        __syncwarp();
        for (int i = 0; i < 8; ++i) expect(memory[8 * lane + i] == 8 * lane + i, "element of a row", i);
        __syncwarp();
        ptx::store_matrix_x4_transposed(memory + 8 * lane, r);
        __syncwarp();
        for (int i = 0; i < 8; ++i) expect(memory[8 * lane + i] == lane / 8 * 64 + 8 * i + lane % 8, "element of a column", i);
      },
      512);
}

// ---------------------------------------------------------------------------------------------------------------- errors

void run_wrong(const std::function<void(Shared&, int)>& body) {
  run_block(
      kGroup,
      [&](int thread) {
        Shared& shared = *ptx::dynamic_shared<Shared>();
        begin(shared, thread);
        body(shared, thread);
      },
      sizeof(Shared));
}

void test_errors() {
  const auto multiply = [](Shared& shared, float (&d)[64]) {
    const uint64_t operand = ptx::operand_of(shared.a, 0, 1024);
    ptx::warpgroup_multiply_bfloat16<false, false>(d, operand, operand);
  };
  check_dies("deadlock", [] { run_wrong([](Shared& shared, int) { ptx::barrier_try_wait(&shared.barrier, 0); }); });
  check_dies("all 1 have arrived", [] {
    run_wrong([](Shared& shared, int thread) {
      if (thread < 2) ptx::barrier_arrive_expect(&shared.barrier, 16);
    });
  });
  check_dies("has not begun", [] { run_wrong([](Shared& shared, int) { ptx::barrier_arrive(reinterpret_cast<uint64_t*>(shared.a)); }); });
  check_dies("before its copies", [] {
    Mapped source(64, 64, 64);
    for (int i = 0; i < 100; ++i) {  // until a launch has late ones
      run_wrong([&](Shared& shared, int thread) {
        if (thread == 0) ptx::copy_box(shared.a, &source.map, 0, 0, &shared.barrier);
      });
    }
  });
  check_dies("not aligned to 128", [] {
    Mapped source(64, 64, 64);
    run_wrong([&](Shared& shared, int) { ptx::copy_box(shared.a + 64, &source.map, 0, 0, &shared.barrier); });
  });
  check_dies("no wgmma.fence", [&] {
    run_wrong([&](Shared& shared, int) {
      float d[64] = {};
      multiply(shared, d);
    });
  });
  check_dies("ends before its multiplications", [&] {
    run_wrong([&](Shared& shared, int) {
      float d[64] = {};
      ptx::warpgroup_fence();
      multiply(shared, d);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<1>();
    });
  });
  check_dies("some warps of a warpgroup did not multiply", [&] {
    run_wrong([&](Shared& shared, int thread) {
      float d[64] = {};
      ptx::warpgroup_fence();
      if (thread < 64) multiply(shared, d);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait_for(d);
    });
  });
  check_dies("lanes multiply different operands", [&] {
    run_wrong([&](Shared& shared, int thread) {
      float d[64] = {};
      ptx::warpgroup_fence();
      const uint64_t operand = ptx::operand_of(shared.b + 1024 * (thread % 2), 0, 1024);
      ptx::warpgroup_multiply_bfloat16<false, false>(d, operand, operand);
    });
  });
}

void test_maps() {
  Buffer memory(4096);
  CUtensorMap map;
  check(cuda::encode_tensor_map(&map, memory.data(), 8, 8, 8) == cudaSuccess, "a map");
  check(cuda::encode_tensor_map(&map, memory.data() + 8, 8, 8, 8) != cudaSuccess, "a map of what is not aligned");
  check(cuda::encode_tensor_map(&map, memory.data(), 8, 12, 8) != cudaSuccess, "a map of rows that are not aligned");
  check(cuda::encode_tensor_map(&map, memory.data(), 0, 8, 8) != cudaSuccess, "a map of nothing");
  check(cuda::encode_tensor_map(&map, memory.data(), 8, 8, 257) != cudaSuccess, "a map of large boxes");
}

TEST_FAMILY(twin_warpgroup) {
  test_maps();
  for_each_seed(8, [] {
    test_copies();
    test_multiplication<false, false>();
    test_multiplication<false, true>();
    test_multiplication<true, false>();
    test_multiplication<true, true>();
    test_store_matrix();
  });
  test_errors();
}

PLANTED_ERROR(box_read_unwaited, "ThreadSanitizer: data race") {
  Mapped source(64, 64, 64);
  run_wrong([&](Shared& shared, int thread) {
    if (thread == 0) {
      ptx::barrier_arrive_expect(&shared.barrier, 8192);
      ptx::copy_box(shared.a, &source.map, 0, 0, &shared.barrier);
      ptx::barrier_try_wait(&shared.barrier, 0);
    }
    if (thread == 64) expect(shared.a[0] != 1, "anything");
  });
}

}  // namespace
}  // namespace bitmask::testing
