/* Text to token ids. */
#ifndef EMBED_TOKENIZE_H
#define EMBED_TOKENIZE_H

#include <stdbool.h>
#include <stdint.h>

#include "memory.h"

enum { TOKENIZE_MOST_BYTES = 1 << 24 }; /* normalised text takes up to four times as much */

/* Replace `out` by the tokens of `text`; `flags` are gp_tokenize_flag. False: out of memory. */
bool tokenize(const uint8_t *text, uint32_t length, uint32_t flags, token_list *out);

#endif
