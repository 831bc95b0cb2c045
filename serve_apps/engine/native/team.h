// Threads that share the units of one loop. A thread takes the next unit when it is free, so one that the
// system keeps from running delays the rest by one unit at most; between loops it waits a few microseconds
// awake, then sleeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace openledger {

using Loop = void (*)(const void* body, int64_t unit);

class Team {
 public:
  explicit Team(int num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Team() {
    is_over_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return int(threads_.size()) + 1; }

  // Calls body(unit) for each of num_units, in any order and on any thread; returns when all are done.
  template <class Body>
  void share(int64_t num_units, const Body& body) {
    if (num_units <= 1 || threads_.empty()) {
      for (int64_t unit = 0; unit < num_units; ++unit) body(unit);
      return;
    }
    const uint64_t job = (ticket_.fetch_or(kClosed) >> 32) + 1;
    loop_.store([](const void* b, int64_t unit) { (*static_cast<const Body*>(b))(unit); }, std::memory_order_release);
    body_.store(&body, std::memory_order_release);
    num_units_.store(num_units, std::memory_order_release);
    open_.store(uint32_t(num_units), std::memory_order_release);
    ticket_.store(job << 32);
    epoch_.store(uint32_t(job));
    epoch_.notify_all();
    while (take(job)) {
    }
    for (int i = 0; i < kPatience; ++i) {
      if (!open_.load(std::memory_order_acquire)) return;
      pause();
    }
    for (uint32_t left; (left = open_.load(std::memory_order_acquire)) != 0;) open_.wait(left);
  }

 private:
  static constexpr uint64_t kClosed = 0xffffffffu;
  static constexpr int kPatience = 2000;  // of the order of 30 microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // The ticket is (job, next unit). Whoever advances it owns that unit. A job ends only when all of its units are
  // done, and its fields change only after the ticket was closed: what was read before a successful exchange
  // belongs to the job that the ticket names.
  bool take(uint64_t job) {
    uint64_t ticket = ticket_.load();
    for (;;) {
      const Loop loop = loop_.load(std::memory_order_acquire);
      const void* body = body_.load(std::memory_order_acquire);
      const int64_t unit = int64_t(ticket & kClosed);
      if (ticket >> 32 != job || unit >= num_units_.load(std::memory_order_acquire)) return false;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      loop(body, unit);
      if (open_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_.notify_all();
      return true;
    }
  }

  void serve() {
    uint32_t seen = 0;
    while (!is_over_) {
      for (int i = 0; i < kPatience && epoch_.load() == seen; ++i) pause();
      epoch_.wait(seen);
      seen = epoch_.load();
      const uint64_t ticket = ticket_.load();
      while (!is_over_ && take(ticket >> 32)) {
      }
    }
  }

  std::vector<std::thread> threads_;
  std::atomic<Loop> loop_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int64_t> num_units_{0};
  std::atomic<uint32_t> open_{0};
  std::atomic<uint32_t> epoch_{0};
  std::atomic<uint64_t> ticket_{0};
  std::atomic<bool> is_over_{false};
};

}  // namespace openledger
