// Tests the twin's matrix instructions against plain loops and the fragments of the PTX ISA.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <array>
#include <cmath>

#include "../native/formats.h"
#include "testing.h"
#include "twin_calls.h"

namespace bitmask::testing {
namespace {

namespace ptx = cuda::ptx;

// Fragments of mma.m16n8k16 as the PTX ISA has them: groupID is lane / 4, threadID_in_group is lane % 4; i counts a lane's elements.
int row_of_a(int lane, int i) { return i == 0 || i == 1 || i == 4 || i == 5 ? lane / 4 : lane / 4 + 8; }
int column_of_a(int lane, int i) { return i < 4 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8; }
int row_of_b(int lane, int i) { return i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8; }
int column_of_b(int lane, int) { return lane / 4; }
int row_of_d(int lane, int i) { return i < 2 ? lane / 4 : lane / 4 + 8; }
int column_of_d(int lane, int i) { return lane % 4 * 2 + (i & 1); }

using Multiply = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], twin::Site);

void test_mma(const Format& format, Multiply multiply) {
  std::array<uint16_t, 16 * 16> a;
  std::array<uint16_t, 16 * 8> b;
  std::array<float, 16 * 8> c, d;
  const auto random_number = [] { return static_cast<double>(random_below(2001) - 1000) / 64; };
  for (uint16_t& bits : a) bits = static_cast<uint16_t>(format.encode(random_number()));
  for (uint16_t& bits : b) bits = static_cast<uint16_t>(format.encode(random_number()));
  for (float& value : c) value = static_cast<float>(random_number());
  run_warp([&](int lane) {
    uint32_t fragment_a[4] = {}, fragment_b[2] = {};
    float fragment_d[4];
    for (int i = 0; i < 8; ++i) {
      const std::size_t at = static_cast<std::size_t>(row_of_a(lane, i) * 16 + column_of_a(lane, i));
      fragment_a[i / 2] |= static_cast<uint32_t>(a[at]) << (16 * (i % 2));
    }
    for (int i = 0; i < 4; ++i) {
      const std::size_t at = static_cast<std::size_t>(row_of_b(lane, i) * 8 + column_of_b(lane, i));
      fragment_b[i / 2] |= static_cast<uint32_t>(b[at]) << (16 * (i % 2));
      fragment_d[i] = c[static_cast<std::size_t>(row_of_d(lane, i) * 8 + column_of_d(lane, i))];
    }
    multiply(fragment_d, fragment_a, fragment_b, {"", 0});
    for (int i = 0; i < 4; ++i) d[static_cast<std::size_t>(row_of_d(lane, i) * 8 + column_of_d(lane, i))] = fragment_d[i];
  });
  for (std::size_t m = 0; m < 16; ++m) {
    for (std::size_t n = 0; n < 8; ++n) {
      double sum = c[m * 8 + n];
      for (std::size_t k = 0; k < 16; ++k) sum += format.decode(a[m * 16 + k]) * format.decode(b[k * 8 + n]);
      check(d[m * 8 + n] == static_cast<float>(sum), "%s d[%zu][%zu]: %g, not %g", format.name, m, n, d[m * 8 + n], sum);
    }
  }
}

// Rounded to the nearest number that has 10 bits of mantissa, ties away from zero.
double to_tfloat32(float value) {
  const double step = std::ldexp(1, std::ilogb(value) - 10);
  return std::copysign(std::floor(std::fabs(value) / step + 0.5) * step, value);
}

// Fragments of mma.m16n8k8: of a, lanes hold column lane % 4 and four more; of b, rows likewise.
void test_tfloat32() {
  float a[16][8], b[8][8], c[16][8], d[16][8];
  const auto fill = [](auto& matrix) {
    for (auto& row : matrix) {
      for (float& value : row) value = static_cast<float>(random_below(2000001) - 1000000) / 4096;
    }
  };
  fill(a);
  fill(b);
  fill(c);
  run_warp([&](int lane) {
    const int group = lane / 4, t = lane % 4;
    const uint32_t fragment_a[4] = {ptx::round_to_tfloat32(a[group][t]), ptx::round_to_tfloat32(a[group + 8][t]),
                                    ptx::round_to_tfloat32(a[group][t + 4]), ptx::round_to_tfloat32(a[group + 8][t + 4])};
    const uint32_t fragment_b[2] = {ptx::round_to_tfloat32(b[t][group]), ptx::round_to_tfloat32(b[t + 4][group])};
    float fragment_d[4];
    for (int i = 0; i < 4; ++i) fragment_d[i] = c[row_of_d(lane, i)][column_of_d(lane, i)];
    ptx::mma_tfloat32(fragment_d, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) d[row_of_d(lane, i)][column_of_d(lane, i)] = fragment_d[i];
  });
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = c[m][n];
      for (int k = 0; k < 8; ++k) sum += to_tfloat32(a[m][k]) * to_tfloat32(b[k][n]);
      check(d[m][n] == static_cast<float>(sum), "mma.tf32 [%d, %d]: %g instead of %g", m, n, static_cast<double>(d[m][n]), sum);
    }
  }
}

TEST_FAMILY(twin_matrix) {
  for_each_seed(10, [] {
    test_mma(kFormats[1], ptx::mma_bfloat16);
    test_mma(kFormats[2], ptx::mma_float16);
    test_tfloat32();
    // ldmatrix: row j of matrix i begins at 16 (8 i + j) bytes, here in reverse order; element e of it is 64 i + 8 j + e.
    run_warp(
        [](int lane) {
          uint16_t* shared = ptx::dynamic_shared<uint16_t>();
          uint16_t* row = shared + 8 * (31 - lane);
          for (int e = 0; e < 8; ++e) row[e] = static_cast<uint16_t>(8 * lane + e);
          __syncwarp();
          uint32_t r[4];
          ptx::load_matrix_x4(r, row);
          for (int i = 0; i < 4; ++i) {
            const uint32_t first = static_cast<uint32_t>(64 * i + 8 * (lane / 4) + 2 * (lane % 4));
            expect(r[i] == ((first + 1) << 16 | first), "ldmatrix", r[i]);
          }
          ptx::load_matrix_x4_transposed(r, row);
          for (int i = 0; i < 4; ++i) {
            const uint32_t upper = static_cast<uint32_t>(64 * i + 16 * (lane % 4) + lane / 4);
            expect(r[i] == ((upper + 8) << 16 | upper), "ldmatrix.trans", r[i]);
          }
          expect(ptx::shared_address(row) == static_cast<uint32_t>(16 * (31 - lane)), "shared_address");
        },
        512);
  });
}

}  // namespace
}  // namespace bitmask::testing
