/* Control of the simulated driver, for tests: injected failures, call counts, usage, what is alive,
   paused workers. Plain C. Linked tests call these directly; tests that load the simulated
   libcuda.so.1 find them with dlsym. */
#ifndef DORMOUSE_TESTS_SIMGPU_SIMGPU_CONTROL_H_
#define DORMOUSE_TESTS_SIMGPU_SIMGPU_CONTROL_H_

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What exists in the simulation at one moment. */
typedef struct simgpu_live_counts {
  size_t handles;  /* physical memory handles (cuMemCreate, import, retain) with a reference left */
  size_t mappings; /* cuMemMap not yet undone */
  size_t reservations;  /* cuMemAddressReserve not yet undone */
  size_t allocations;   /* cuMemAlloc and kin, opened IPC memory included */
  size_t host;          /* cuMemHostAlloc and kin */
  size_t registrations; /* cuMemHostRegister not yet undone */
  size_t streams;       /* created streams (default streams are not counted) */
  size_t events;
} simgpu_live_counts;

/* One launch as a simulated kernel sees it. `params[i]` points to `param_sizes[i]` bytes that were
   copied at the launch. */
typedef struct simgpu_launch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  unsigned param_count;
  const void* const* params;
  const size_t* param_sizes;
} simgpu_launch;

typedef void (*simgpu_kernel)(const simgpu_launch* launch, void* user);

/* Makes the `nth` use of the function from now on (1 is the next) return `result`, a CUresult,
   without any effect. nth 0: every use. Names count without their version and stream suffix:
   "cuMemAlloc" and "cuMemAlloc_v2" are the same; "*" is any function. Returns 0, or -1 for a name
   that is not a driver function's. Thread-safe. */
int simgpu_fail_at(const char* name, unsigned long long nth, int result);

/* The same for the uses `first` to `last`, both included. */
int simgpu_fail_range(const char* name, unsigned long long first, unsigned long long last,
                      int result);

/* Forgets every injected failure, those of SIMGPU_FAIL too. */
void simgpu_clear_failures(void);

/* How often the function was used since the start or the last reset; "*" is the sum over all
 * functions. */
unsigned long long simgpu_call_count(const char* name);

/* Calls `visit` for each function that was used since the last reset, in the order of names. */
void simgpu_for_each_count(void (*visit)(const char* name, unsigned long long count, void* user),
                           void* user);

void simgpu_reset_counts(void);

/* Bytes of physical memory in use on a device, whole 2 MiB pages; 0 for an unknown device. */
size_t simgpu_usage(int device);

void simgpu_live(simgpu_live_counts* counts);

/* Bytes pinned by cuMemHostAlloc and cuMemHostRegister. */
size_t simgpu_pinned(void);

/* While held (calls nest), no stream starts its next operation, so that what is not yet complete
   stays so. A call that waits for a stream blocks until the release. */
void simgpu_hold_streams(void);
void simgpu_release_streams(void);

/* Gives the kernel `name` an implementation, before a module that has it is loaded. Returns 0, or
   -1 if the name has one already. */
int simgpu_register_kernel(const char* name, simgpu_kernel kernel, void* user);

#ifdef __cplusplus
}
#endif

#endif /* DORMOUSE_TESTS_SIMGPU_SIMGPU_CONTROL_H_ */
