/* Merges by their pair of tokens: an open-addressed hash table in linear memory, at most half full. */
#ifndef LLAMA_MERGES_H
#define LLAMA_MERGES_H

#include <stdbool.h>
#include <stdint.h>

#include "assets.h"

/* Room for `num_merges`; once, at init. False: out of memory. */
bool merges_create(uint32_t num_merges);

/* Of a pair given twice the first, which has the lower rank, counts. */
void merges_insert(const merge *entry, uint32_t rank);

/* Token that the pair merges into, or NO_TOKEN; `rank` is set when there is one. */
uint32_t merges_find(uint32_t left, uint32_t right, uint32_t *rank);

#endif
