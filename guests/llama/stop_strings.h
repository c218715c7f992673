/* Stop strings of one sequence, matched byte by byte as text arrives (Knuth, Morris, Pratt), so that neither token
 * borders nor the number of tokens matter. */
#ifndef LLAMA_STOP_STRINGS_H
#define LLAMA_STOP_STRINGS_H

#include <stdbool.h>
#include <stdint.h>

enum { STOP_MOST_STRINGS = 256, STOP_MOST_BYTES = 65536 };

typedef struct {
    uint8_t *text;
    uint32_t *borders; /* borders[i]: longest proper prefix of text[0..i] that is also its suffix */
    uint32_t length;
    uint32_t num_matched; /* bytes of text that the output ends with */
} stop_string;

typedef struct {
    stop_string *strings;
    uint32_t count;
    uint32_t longest; /* bytes */
} stop_strings;

/* Bytes that the strings of a stop block (u32 count, then for each u32 length and its bytes) need; 0: malformed, a
 * string is not UTF-8, or there are more than the limits above. Empty strings are ignored. */
uint32_t stop_strings_room(const uint8_t *block, uint32_t length);

/* Build from a block that stop_strings_room accepted, in `memory` (8-byte aligned) of that many bytes. */
void stop_strings_build(stop_strings *stops, const uint8_t *block, uint32_t length, void *memory);

/* Take one byte of output. Length of the stop string that it completes, the longest if there are several; 0: none. */
uint32_t stop_strings_feed(stop_strings *stops, uint8_t byte);

/* Bytes at the end of the output that may be the beginning of a stop string. */
uint32_t stop_strings_held(const stop_strings *stops);

void stop_strings_reset(stop_strings *stops);

#endif
