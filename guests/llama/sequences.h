/* Open sequences: incremental text and stop rules of one choice each. */
#ifndef LLAMA_SEQUENCES_H
#define LLAMA_SEQUENCES_H

#include <stdbool.h>
#include <stdint.h>

enum { SEQUENCES_MOST_OPEN = 65536 };

/* Handle of a new sequence, or -1: malformed stop block, too many sequences, or out of memory (the log says which).
 * `flags` are gp_sequence_flag; a block of 0 bytes means no stop strings. */
int32_t sequence_open(const uint8_t *stop_block, uint32_t length, uint32_t flags);

/* Text that a call released; valid until the next call of any function here. */
typedef struct {
    const uint8_t *text;
    uint32_t length;
    uint32_t finish; /* enum gp_finish */
} released_text;

/* Take one sampled token. After the sequence has finished, tokens give no text and the same `finish`.
 * False: unknown handle or token, or out of memory. */
bool sequence_push(int32_t handle, uint32_t token, released_text *released);

/* Release what is held back; an unfinished character becomes U+FFFD. The sequence may go on afterwards. */
bool sequence_flush(int32_t handle, released_text *released);

/* Free a sequence; a handle that is not open is ignored. */
void sequence_close(int32_t handle);

#endif
