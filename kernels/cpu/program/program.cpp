// program: functions of this library, one after another, on memory whose places are given for each run.
#include <cstdlib>
#include <cstring>

#include "common/step.h"
#include "common/threads.h"

using namespace insvp_fast;

struct Step {  // a row of the table in insvp_fast/runtime/native/program.py
  int (*run)(const Slot*, int threads);
  int64_t first;  // of its slots
};

struct Place {  // a row of another
  int64_t slot;   // gets an address
  int64_t piece;  // of memory
  int64_t offset;
};

// Runs the steps, with `slots` as their arguments, but for the addresses of places: a piece of memory begins at its
// `start`. Returns 0, or the number other than 0 that a step has returned, after which none is run; -1 without memory.
INSVP_FAST_API int program(const Step* steps, int64_t num_steps, const Slot* slots, int64_t num_slots,
                           const Place* places, int64_t num_places, const int64_t* starts, int threads) {
  const size_t bytes = larger(1, num_slots) * sizeof(Slot);
  Slot* own = static_cast<Slot*>(std::malloc(bytes));  // other threads may run the same program
  if (!own) return -1;
  std::memcpy(own, slots, num_slots * sizeof(Slot));
  for (const Place* p = places; p < places + num_places; ++p) own[p->slot].bits = starts[p->piece] + p->offset;
  int result = 0;
  const auto run = [&] {
    for (const Step* s = steps; s < steps + num_steps && result == 0; ++s) result = s->run(own + s->first, threads);
  };
#ifdef _OPENMP
  Team team;
#pragma omp parallel num_threads(threads)
  if (const int thread = omp_get_thread_num()) {
    team.serve(thread);
  } else {
    team.lead(omp_get_num_threads());  // which may be fewer
    run();
    team.dismiss();
  }
#else
  run();
#endif
  std::free(own);
  return result;
}
