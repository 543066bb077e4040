/* The C interface of Dormouse, C99. For programs that mark their memory themselves or that put it
 * to sleep and wake it.
 *
 * The functions are in the preloaded library. A program that shall also run without it declares
 * that it can do without, links nothing, and asks before it calls:
 *
 *     #define DORMOUSE_OPTIONAL
 *     #include "dormouse.h"
 *     ...
 *     if (dormouse_version != NULL) dormouse_region_begin("weights");
 *
 * All functions are thread-safe, none ends the process, none throws. Those that return int return
 * DORMOUSE_OK or one of the codes below; dormouse_last_error_message() then says what happened.
 * With DORMOUSE=off in the environment they do nothing, say nothing in the log, and return
 * DORMOUSE_NOT_ACTIVE, except for dormouse_stats(), which then finds no memory.
 */
#ifndef DORMOUSE_H
#define DORMOUSE_H

#include <stddef.h>
#include <stdint.h>

#ifdef DORMOUSE_OPTIONAL
#define DORMOUSE_API __attribute__((weak))
#else
#define DORMOUSE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  DORMOUSE_OK = 0,
  DORMOUSE_INVALID_ARGUMENT = 1,     /* the caller's mistake; nothing was done */
  DORMOUSE_NOT_FOUND = 2,            /* a tag that no memory and no rule ever had */
  DORMOUSE_OUT_OF_DEVICE_MEMORY = 3, /* everything stays asleep and intact; try again */
  DORMOUSE_OUT_OF_HOST_MEMORY = 4,   /* no place for the backup, or for the call itself */
  DORMOUSE_BUSY = 5,                 /* running work or another operation; try again */
  DORMOUSE_UNSUPPORTED = 6,          /* this machine or driver cannot do it */
  DORMOUSE_DRIVER_ERROR = 7,         /* a call of the CUDA driver failed */
  DORMOUSE_IO_ERROR = 8,             /* a system call failed */
  DORMOUSE_NO_REGION = 9,            /* an end without a begin; nothing was done */
  DORMOUSE_NOT_ACTIVE = 10           /* switched off, or the process has not used CUDA yet */
};

/* What becomes of a tag's content while it sleeps. */
enum {
  DORMOUSE_BACKUP_HOST = 0, /* kept in host memory */
  DORMOUSE_BACKUP_NONE = 1, /* discarded; the memory reads as zero after waking */
  DORMOUSE_BACKUP_DISK = 2  /* kept in a file; needs DORMOUSE_DISK_DIR */
};

/* Flags of dormouse_sleep(). */
enum {
  DORMOUSE_SLEEP_DISCARD = 1u, /* drop the content whatever the tag's policy is */
  /* Calls of other threads that could touch the memory wait until it is awake (or do what
     DORMOUSE_GATE says), as for a sleep from outside. Without it, the program itself sees to it
     that nothing touches sleeping memory. */
  DORMOUSE_SLEEP_GATE = 2u
};

/* "0.1.0". */
DORMOUSE_API const char* dormouse_version(void);

/* --- Regions of the calling thread. Device memory allocated inside one gets its tag. They nest:
 * beyond 64 on one thread they are counted, so that ends match, but keep the tag of the 64th, which
 * the log says once.
 *
 * Where a begin does not return DORMOUSE_OK, no region began, and there must be no end. */

/* A tag is 1 to 64 letters, digits and _ . / - characters and begins with none of - . /, as in
 * DORMOUSE_REGIONS; "-" alone is 'no tag'. Its policy is that of the item of DORMOUSE_REGIONS that
 * names it, else DORMOUSE_BACKUP_HOST. DORMOUSE_INVALID_ARGUMENT for anything else,
 * DORMOUSE_OUT_OF_HOST_MEMORY, DORMOUSE_NOT_ACTIVE. */
DORMOUSE_API int dormouse_region_begin(const char* tag);

/* The same with a policy, a DORMOUSE_BACKUP_ value. Memory of one tag with two policies is kept
 * apart; sleep and wake by name reach both. DORMOUSE_INVALID_ARGUMENT also for "-", which has no
 * policy, and for DORMOUSE_BACKUP_DISK without DORMOUSE_DISK_DIR. */
DORMOUSE_API int dormouse_region_begin_with_backup(const char* tag, int backup);

/* A region whose memory gets no tag, within others too: dormouse_region_begin("-"). */
DORMOUSE_API int dormouse_region_begin_none(void);

/* Ends the innermost region of the calling thread. DORMOUSE_NO_REGION if there is none,
 * DORMOUSE_NOT_ACTIVE. */
DORMOUSE_API int dormouse_region_end(void);

/* The tag that an allocation of the calling thread gets now, rules on sizes and thread names aside;
 * "" for none. Valid for the life of the process. */
DORMOUSE_API const char* dormouse_current_tag(void);

/* How many regions the calling thread is inside of. */
DORMOUSE_API size_t dormouse_region_depth(void);

/* --- Sleep and wake of all memory with one of `count` tags; of all tagged memory if `tags` is
 * NULL. What sleeps already, or is awake already, is left alone. They wait until it is done, and
 * for an operation that another thread or the dormouse command has begun. In a thread of Python's
 * they give the GIL away meanwhile.
 *
 * All return DORMOUSE_INVALID_ARGUMENT for a NULL in the list, a list of no tags or an unknown
 * flag; DORMOUSE_NOT_FOUND for a tag that nothing in this process ever named; DORMOUSE_NOT_ACTIVE
 * before the process has used CUDA, in a forked child, while the process exits; and
 * DORMOUSE_OUT_OF_HOST_MEMORY where the call itself finds no memory. */

/* Waits up to 30 s for the work that runs on the device, and with DORMOUSE_SLEEP_GATE up to 30 s
 * more for calls of other threads into the driver; DORMOUSE_BUSY if they have not ended by then, or
 * while a stream captures a graph. DORMOUSE_OUT_OF_HOST_MEMORY where there is no place for the
 * backups, DORMOUSE_UNSUPPORTED where they need a directory that is not set, DORMOUSE_IO_ERROR
 * where the disk refuses them, DORMOUSE_DRIVER_ERROR. No content is lost then, and mostly all is
 * awake; a part can have fallen asleep, which the message says: dormouse_is_sleeping() tells,
 * dormouse_wake() wakes it, and the sleep can be tried again. */
DORMOUSE_API int dormouse_sleep(const char* const* tags, size_t count, unsigned int flags);

/* DORMOUSE_OUT_OF_DEVICE_MEMORY, DORMOUSE_IO_ERROR where the disk does not give a backup back,
 * DORMOUSE_DRIVER_ERROR: everything that was to wake is asleep and intact then, and the wake can be
 * tried again. */
DORMOUSE_API int dormouse_wake(const char* const* tags, size_t count);

/* As dormouse_sleep() with DORMOUSE_SLEEP_DISCARD, with its waits and codes, and the backups of
 * what sleeps already are dropped: after waking, the memory reads as zero. */
DORMOUSE_API int dormouse_discard(const char* const* tags, size_t count);

/* Sets *sleeping to 1 if any memory of the tags is asleep, else to 0. Waits for nothing. */
DORMOUSE_API int dormouse_is_sleeping(const char* const* tags, size_t count, int* sleeping);

/* Keeps the buffer that `pointer` points into awake until it is freed (`on` is not 0), or lets it
 * sleep again (0): for memory whose physical pages somebody else uses in a way that Dormouse cannot
 * see, as a network card does that registered it by nvidia-peermem. What sleeps is woken. The pages
 * around the buffer, which other buffers may share, stay awake with it: the status tells how much.
 * DORMOUSE_NOT_FOUND where no tagged memory is, DORMOUSE_OUT_OF_DEVICE_MEMORY if it sleeps and
 * cannot be woken, DORMOUSE_DRIVER_ERROR, DORMOUSE_NOT_ACTIVE. */
DORMOUSE_API int dormouse_keep_awake(const void* pointer, int on);

/* --- Figures. */

/* One tag on one device; sizes in bytes. New members are only ever added at the end. */
struct dormouse_tag_stats {
  size_t size; /* set by the caller: sizeof(struct dormouse_tag_stats) */
  char tag[72];
  int backup;         /* DORMOUSE_BACKUP_ */
  int device;         /* the driver's ordinal */
  uint64_t allocated; /* in live blocks, as asked for */
  uint64_t mapped;    /* device memory held now */
  uint64_t asleep;    /* device memory given back, to be restored */
  uint64_t backed_up; /* host memory that backups hold */
  uint64_t on_disk;   /* backups in files */
  uint64_t peak_allocated;
  uint64_t peak_mapped;
  uint64_t blocks;      /* live */
  uint64_t chunks;      /* awake and asleep */
  uint64_t allocations; /* ever */
  uint64_t frees;       /* ever */
  uint64_t sleeps;
  uint64_t wakes;
  double last_sleep_seconds;
  double last_wake_seconds;
  uint64_t held; /* of `mapped`, what stays awake: others hold it, or dormouse_keep_awake() */
};

/* Fills at most `capacity` elements of `stats`, each as far as stats[0].size reaches (which is also
 * the distance between elements), and sets *count to how many there are, which can be more. `stats`
 * may be NULL where `capacity` is 0. */
DORMOUSE_API int dormouse_stats(struct dormouse_tag_stats* stats, size_t capacity, size_t* count);

/* --- Errors. */

/* A short text for a code. Never NULL. */
DORMOUSE_API const char* dormouse_strerror(int code);

/* What happened in the calling thread's last call that did not return DORMOUSE_OK, and what to do
 * about it; "" before there was one. Valid until the thread's next call. */
DORMOUSE_API const char* dormouse_last_error_message(void);

#ifdef __cplusplus
}
#endif

#endif
