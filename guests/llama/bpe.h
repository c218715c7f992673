/* Byte-pair encoding of one word, in O(n log n): the symbols are a linked list, the possible merges a heap. */
#ifndef LLAMA_BPE_H
#define LLAMA_BPE_H

#include <stdbool.h>
#include <stdint.h>

#include "memory.h"

enum { BPE_LONGEST_WORD_BYTES = 1 << 26 }; /* keeps every size below the 4 GiB of linear memory */

/* Append the tokens of `word` to `out`. A byte-level model drops bytes that its vocabulary lacks; SentencePiece falls
 * back to byte tokens, or to one unknown token for a run of unknown characters. False: out of memory. */
bool bpe_encode(const uint8_t *word, uint32_t length, token_list *out);

#endif
