/* Special tokens that are written out in a text. */
#ifndef EMBED_SPECIAL_TOKENS_H
#define EMBED_SPECIAL_TOKENS_H

#include <stdint.h>

typedef struct {
    uint32_t token; /* NO_TOKEN: none up to the end */
    uint32_t start;
    uint32_t end;
} special_match;

/* The first special token at or after `start`, the longest of those that begin there. Without a match start and end are
 * `length`. */
special_match special_tokens_find(const uint8_t *text, uint32_t start, uint32_t length);

#endif
