/* What BERT's normaliser and pre-tokeniser know of a code point. */
#ifndef EMBED_UNICODE_H
#define EMBED_UNICODE_H

#include <stdint.h>

enum char_flag {
    CHAR_CLEANED_AWAY = 1,  /* control, format, unassigned, U+0000, U+FFFD */
    CHAR_CLEANED_SPACE = 2, /* becomes a space when text is cleaned */
    CHAR_CJK = 4,           /* an ideograph that stands alone */
    CHAR_PUNCTUATION = 8,   /* a word of its own */
    CHAR_SPACE = 16,        /* between words */
    CHAR_STRIPPED = 32,     /* nothing is left of it without accents */
    CHAR_COMBINES = 64,     /* canonical combining class is not 0 */
};

enum { MOST_MAPPED = 4 }; /* code points that one becomes */

/* Flags of a code point; beyond U+10FFFF none. */
uint32_t unicode_flags(uint32_t code_point);

/* Canonical decomposition without nonspacing marks, or lower case: the number of code points written to `mapped`. */
uint32_t unicode_strip_accents(uint32_t code_point, uint32_t mapped[MOST_MAPPED]);
uint32_t unicode_lowercase(uint32_t code_point, uint32_t mapped[MOST_MAPPED]);

/* Canonical combining class of a code point that unicode_strip_accents leaves. */
uint32_t unicode_combining_class(uint32_t code_point);

#endif
