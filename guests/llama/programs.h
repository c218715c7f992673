/* The model's forward pass, recorded once at init as programs of tensor operations. */
#ifndef LLAMA_PROGRAMS_H
#define LLAMA_PROGRAMS_H

#include <stdbool.h>

/* Record the prefill and the decode program of the loaded configuration. False: a weight is missing or the host
 * refused a program; the log says which. */
bool programs_record(void);

#endif
