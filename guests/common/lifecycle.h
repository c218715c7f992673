/* The exports that every guest of ours shares: gp_abi, gp_init, gp_resume, gp_buffer. */
#ifndef COMMON_LIFECYCLE_H
#define COMMON_LIFECYCLE_H

#include <stdbool.h>

enum { FAILED = -1 };

/* The guest provides both, for gp_init. False: it failed, and the log says why. */
bool assets_load(void);
bool programs_record(void);

/* Whether gp_init has succeeded. */
bool guest_is_ready(void);

#endif
