/* Tokens by their text. */
#ifndef LLAMA_VOCABULARY_H
#define LLAMA_VOCABULARY_H

#include <stdbool.h>
#include <stdint.h>

/* Build the tables from the loaded assets. False: out of memory. */
bool vocabulary_index(void);

/* The ordinary token with exactly this text, or NO_TOKEN. Control, unknown, unused and byte tokens are never found:
 * text cannot become one of them by merging. Only indexed for SentencePiece and TOKENIZER_IGNORE_MERGES. */
uint32_t vocabulary_find(const uint8_t *text, uint32_t length);

/* The token that stands for one byte (of byte-level BPE, or of SentencePiece's byte fallback), or NO_TOKEN. */
uint32_t vocabulary_byte_token(uint8_t byte);

#endif
