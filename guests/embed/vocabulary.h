/* Pieces of words by their text. */
#ifndef EMBED_VOCABULARY_H
#define EMBED_VOCABULARY_H

#include <stdbool.h>
#include <stdint.h>

/* Build the table from the loaded assets. False: out of memory. */
bool vocabulary_index(void);

/* A text that grows by a byte at a time, with the hash of what it has so far. */
typedef struct {
    uint32_t hash;
    bool continues_word; /* the piece's text in the vocabulary begins with "##" */
} piece_prefix;

piece_prefix piece_begin(bool continues_word);
void piece_extend(piece_prefix *prefix, uint8_t byte);

/* The token of the piece that was built: `text` is its bytes without "##". NO_TOKEN where there is none. Special tokens
 * are never found: plain text does not become one. */
uint32_t vocabulary_find(const piece_prefix *prefix, const uint8_t *text, uint32_t length);

/* Bytes of the longest piece, without "##". */
uint32_t vocabulary_longest_piece(void);

#endif
