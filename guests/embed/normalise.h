/* BERT's normaliser: clean text, space around ideographs, accents stripped, lower case, each as the model asks for it.
 *
 * Source: BertNormalizer of the tokenizers package, whose Unicode the tables hold.
 */
#ifndef EMBED_NORMALISE_H
#define EMBED_NORMALISE_H

#include <stdbool.h>
#include <stdint.h>

#include "memory.h"

/* Code points under construction. */
typedef struct {
    buffer memory;
    uint32_t count;
} char_list;

/* Replace `out` by the normalised text. An ill-formed byte counts as U+FFFD. False: out of memory. */
bool normalise(const uint8_t *text, uint32_t length, char_list *out);

static inline uint32_t *char_list_data(const char_list *list) {
    return list->memory.data;
}

#endif
