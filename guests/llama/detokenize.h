/* Token ids to text, piece by piece. */
#ifndef LLAMA_DETOKENIZE_H
#define LLAMA_DETOKENIZE_H

#include <stdbool.h>
#include <stdint.h>

#include "utf8.h"

/* State between two tokens of a text. All zero: before the first. */
typedef struct {
    utf8_stream characters;
    bool has_begun; /* some token has given text, or the text continues another */
} detokenizer;

/* Most bytes that detokenize_token writes. */
uint64_t detokenize_room(uint32_t token);

/* Write the characters that `token` completes to `out`; the number of bytes written. Special tokens are hidden unless
 * `show_special`, and so are ids between the tokeniser's size and the model's vocabulary size (padding). The first
 * space of a SentencePiece text with a dummy prefix is dropped. */
uint32_t detokenize_token(detokenizer *state, uint32_t token, bool show_special, uint8_t *out);

/* Whether an id can come out of the model at all. */
bool detokenize_accepts(uint32_t token);

#endif
