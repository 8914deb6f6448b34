// Splits the elements of a matrix into tasks and runs them on torch's own thread pool.
#pragma once

#include <cstdint>
#include <utility>

#include "layout.h"

namespace bitmask {

// Row-major blocks of about kTaskElements elements: whole rows, or parts of one row (of whole groups) where rows are longer.
class Tasks {
 public:
  struct Task {
    int64_t row;
    int64_t col;
    int64_t rows;  // 1 where cols is only a part of the row
    int64_t cols;
  };

  explicit Tasks(const Geometry& g);

  int64_t count() const { return count_; }
  bool whole_rows() const { return parts_ == 1; }
  int64_t parts_per_row() const { return parts_; }
  Task operator[](int64_t index) const;

  // What a task costs, in bytes that it touches, for elements of `width` bytes; a row by itself costs about as much as kRowBytes.
  int64_t bytes(int64_t width) const;

 private:
  static constexpr int64_t kTaskElements = 64 * 1024;
  static constexpr int64_t kRowBytes = 128;

  Geometry g_;
  int64_t rows_per_task_;
  int64_t parts_;  // tasks in a row
  int64_t count_;
};

// Where a task lies in the elements and in the bitmasks of the matrix.
struct Slice {
  Tasks::Task task;
  int64_t element;
  int64_t mask_byte;
};

inline Slice slice_of(const Tasks& tasks, int64_t index, const Geometry& g) {
  const Tasks::Task task = tasks[index];
  return {task, task.row * g.cols + task.col, task.row * bitmask_bytes(g.cols) + task.col / 8};
}

inline int64_t sum(const int64_t* counts, int64_t length) {
  int64_t total = 0;
  for (int64_t i = 0; i < length; ++i) total += counts[i];
  return total;
}

// Replaces counts by their exclusive prefix sums, from `start` on; returns the total.
inline int64_t exclusive_prefix_sums(int64_t* counts, int64_t length, int64_t start) {
  for (int64_t i = 0; i < length; ++i) start += std::exchange(counts[i], start);
  return start;
}

// Runs body(context, index) for every index below `count`, in contiguous ranges over torch's threads; serially in a process forked from
// one that had loaded this library, because an OpenMP pool does not survive fork() (a fork before this library is loaded goes unnoticed).
// Between waves of about a tenth of a second (`bytes` is what one task touches), which may span calls, it asks the interrupt check, on the
// calling thread, and throws std::runtime_error(kInterrupted) if that says so.
void run_tasks(int64_t count, int64_t bytes, void (*body)(const void* context, int64_t index), const void* context);

template <typename Body>
void for_each_task(int64_t count, int64_t bytes, const Body& body) {
  run_tasks(count, bytes, [](const void* context, int64_t index) { (*static_cast<const Body*>(context))(index); }, &body);
}

constexpr const char* kInterrupted = "bitmask: interrupted";

// Whether the caller's thread has been asked to stop (module.cpp looks at Python's pending signals).
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);

}  // namespace bitmask
