// Threads that stay together from one operation of a program to the next. OpenMP ends each operation by putting its
// threads to sleep, from which they return late, or lets them spin for long, on a busy machine at their own expense.
#pragma once
#include <atomic>
#include <cstdint>

namespace insvp_fast {

// One thread leads: it says what all do, does its part, and waits for the others, which serve. It calls `lead`, `run`
// and `dismiss`, the others call `serve`. The team outlives all calls.
class Team {
 public:
  // The team that this thread leads, while it does no part of an order itself; or null.
  static Team* current();

  void lead(int size);     // by thread 0: from now on, a team of so many threads
  void dismiss();          // by thread 0: the others return from `serve`
  void serve(int thread);  // by threads 1 to size - 1

  // Calls body(thread) in all threads below `threads` that the team has, which may be fewer, and returns when all are
  // done.
  template <class Body>
  void run(int threads, const Body& body) {
    call_ = [](const void* data, int thread) { (*static_cast<const Body*>(data))(thread); };
    data_ = &body, called_ = threads;
    begin();
    body(0);
    finish();
  }

 private:
  // A number that threads wait for.
  class Signal {
   public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void set(uint32_t value);
    void count_down();                                  // wakes at 0 only
    void wait_for_change(uint32_t old, int& patience);  // may miss a change that wakes nobody

   private:
    void wake_all();
    std::atomic<uint32_t> value_{0}, sleepers_{0};
  };

  void begin();
  void finish();

  int size_ = 1, called_ = 1, patience_ = 0;
  void (*call_)(const void*, int thread) = nullptr;  // null: the team is dismissed
  const void* data_ = nullptr;
  alignas(64) Signal orders_;  // how many were given
  alignas(64) Signal busy_;    // how many of the others have not done the last one
};

}  // namespace insvp_fast
