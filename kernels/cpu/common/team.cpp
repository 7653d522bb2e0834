// The order of a team's work, and how its threads wait.
#include "common/team.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <sched.h>
#endif

namespace insvp_fast {
namespace {

// A thread waits awake for so many pauses of the processor (8192 take a fraction of a millisecond), then asleep, from
// which it returns late. A wait that ends asleep halves the pauses of the next one, as on a busy machine others have
// the processor for much longer; one that ends awake doubles them.
constexpr int kMostPatience = 8192, kLeastPatience = 64;

thread_local Team* current_team = nullptr;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// All threads see one order of the writes to value_ and sleepers_ (they are sequentially consistent): either a sleeper
// reads the new value, or the thread that has set it reads the sleeper.
void Team::Signal::wake_all() {
  if (sleepers_.load() == 0) return;
#ifdef __linux__
  syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

void Team::Signal::set(uint32_t value) {
  value_.store(value);
  wake_all();
}

void Team::Signal::count_down() {
  if (value_.fetch_sub(1) == 1) wake_all();
}

void Team::Signal::wait_for_change(uint32_t old, int& patience) {
  for (int i = 0; i < patience; ++i) {
    if (value() != old) {
      patience = patience < kMostPatience / 2 ? 2 * patience : kMostPatience;
      return;
    }
    relax();
  }
  patience = patience / 2 > kLeastPatience ? patience / 2 : kLeastPatience;
  sleepers_.fetch_add(1);
  while (value_.load() == old) {
#ifdef __linux__
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
  }
  sleepers_.fetch_sub(1);
}

Team* Team::current() { return current_team; }

void Team::lead(int size) { size_ = size, patience_ = kMostPatience, current_team = this; }

void Team::begin() {
  current_team = nullptr;  // work within the leader's part is its own
  busy_.set(static_cast<uint32_t>(size_ - 1));
  orders_.set(orders_.value() + 1);
}

void Team::finish() {
  for (uint32_t left; (left = busy_.value()) != 0;) busy_.wait_for_change(left, patience_);
  current_team = this;
}

void Team::dismiss() {
  current_team = nullptr;
  call_ = nullptr;
  orders_.set(orders_.value() + 1);
}

void Team::serve(int thread) {
  int patience = kMostPatience;
  for (uint32_t done = 0;; ++done) {
    orders_.wait_for_change(done, patience);
    if (!call_) return;
    if (thread < called_) call_(data_, thread);
    busy_.count_down();
  }
}

}  // namespace insvp_fast
