/* Records a model's forward pass as programs of tensor operations and hands them to the host. Init only. */
#ifndef COMMON_PROGRAM_RECORDER_H
#define COMMON_PROGRAM_RECORDER_H

#include <stdbool.h>
#include <stdint.h>

#include "glowplug.h"

/* Make room for a program of `num_layers` times `per_layer` operations and `outside_layers` more.
 * False: too many, or out of memory; the log says which. */
bool recorder_open(uint32_t num_layers, uint32_t per_layer, uint32_t outside_layers);

/* The program's next operation, with one input and no tensors; the caller fills in what else it has. */
gp_operation *recorder_add(enum gp_opcode opcode, uint32_t out, uint32_t in);

/* Handle of the weight `name`, or of `layers.LAYER.name`. A weight that is missing is logged and fails the next
 * recorder_submit; recording runs on, to name every missing one at once. */
uint32_t model_weight(const char *name);
uint32_t layer_weight(uint32_t layer, const char *name);

/* Hand over the operations recorded so far as the program of that kind, and begin the next one.
 * False: a weight was missing or the host refused the program; the log says which. */
bool recorder_submit(enum gp_program_kind kind, uint32_t num_values);

void recorder_close(void);

#endif
