/* WordPiece: a word becomes the longest pieces of the vocabulary, from left to right. */
#ifndef EMBED_WORDPIECE_H
#define EMBED_WORDPIECE_H

#include <stdbool.h>
#include <stdint.h>

#include "memory.h"

/* Append the pieces of the word of `count` code points to `out`; the unknown token where some of it is in no piece, or
 * it is longer than the model allows. False: out of memory. */
bool wordpiece_encode(const uint32_t *word, uint32_t count, token_list *out);

#endif
