/* Tokens that are written out in a text: longest match at each place, before the text is split into words. */
#ifndef LLAMA_SPECIAL_TOKENS_H
#define LLAMA_SPECIAL_TOKENS_H

#include <stdbool.h>
#include <stdint.h>

/* Prepare the search over the loaded assets. False: they are not sorted by text, or one is empty. */
bool special_tokens_index(void);

typedef struct {
    uint32_t token; /* NO_TOKEN: none up to the end */
    uint32_t start;
    uint32_t end;
} special_match;

/* The first special token at or after `start`, the longest of those that begin there. USER_DEFINED tokens always
 * count, CONTROL and UNKNOWN ones only with `parse_special`. Without a match start and end are `length`. */
special_match special_tokens_find(const uint8_t *text, uint32_t start, uint32_t length, bool parse_special);

#endif
