#include "parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace bitmask {
namespace {

// Memory that the tasks of one wave touch, for each thread: a tenth of a second even on a slow core.
constexpr int64_t kWaveBytes = int64_t{256} << 20;

std::atomic<InterruptCheck> interrupt_check{nullptr};
std::atomic<bool> forked{false};

const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Before a wave: stops here if the waves since the last look, and this one, are more than one wave's memory. An op may be many calls of
// run_tasks, each of less than a wave, so the count outlives a call.
void stop_if_interrupted(int64_t bytes_per_thread) {
  thread_local int64_t touched = 0;
  const bool look = touched > 0 && touched > kWaveBytes - bytes_per_thread;
  touched = look ? bytes_per_thread : touched + bytes_per_thread;
  const InterruptCheck check = interrupt_check.load();
  if (look && check != nullptr && check()) throw std::runtime_error(kInterrupted);
}

}  // namespace

Tasks::Tasks(const Geometry& g) : g_(g), rows_per_task_(1), parts_(1), count_(0) {
  if (g.rows == 0) return;
  if (g.cols > kTaskElements) {
    parts_ = (g.cols - 1) / kTaskElements + 1;
    count_ = g.rows * parts_;
  } else {
    rows_per_task_ = kTaskElements / std::max<int64_t>(g.cols, 1);
    count_ = (g.rows - 1) / rows_per_task_ + 1;
  }
}

Tasks::Task Tasks::operator[](int64_t index) const {
  if (whole_rows()) {
    const int64_t row = index * rows_per_task_;
    return {row, 0, std::min(rows_per_task_, g_.rows - row), g_.cols};
  }
  const int64_t col = index % parts_ * kTaskElements;
  return {index / parts_, col, 1, std::min(kTaskElements, g_.cols - col)};
}

int64_t Tasks::bytes(int64_t width) const {
  if (count_ == 0) return 0;
  const Task first = (*this)[0];
  return first.rows * (first.cols * width + kRowBytes);
}

void set_interrupt_check(InterruptCheck check) { interrupt_check.store(check); }

void run_tasks(int64_t count, int64_t bytes, void (*body)(const void* context, int64_t index), const void* context) {
  const int64_t threads = forked.load() ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t task_bytes = std::max<int64_t>(bytes, 1);
  const int64_t wave = std::max<int64_t>(kWaveBytes / task_bytes, 1) * threads;
  for (int64_t begin = 0; begin < count; begin += wave) {
    const int64_t end = std::min(begin + wave, count);
    stop_if_interrupted((end - begin + threads - 1) / threads * task_bytes);
    const auto range = [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) body(context, index);
    };
    if (forked.load()) {
      range(begin, end);
    } else {
      torch::stable::parallel_for(begin, end, 1, range);
    }
  }
}

}  // namespace bitmask
