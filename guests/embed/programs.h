/* The model's forward pass, recorded once at init as a program of tensor operations. */
#ifndef EMBED_PROGRAMS_H
#define EMBED_PROGRAMS_H

#include <stdbool.h>

/* Record the encode program of the loaded configuration. False: a weight is missing or the host refused the program;
 * the log says which. */
bool programs_record(void);

#endif
