/* Character classes of the pre-tokenisers' regular expressions. */
#ifndef LLAMA_UNICODE_H
#define LLAMA_UNICODE_H

#include <stdint.h>

typedef enum {
    CLASS_OTHER = 0,       /* none of the below */
    CLASS_LETTER = 1,      /* \p{L} */
    CLASS_NUMBER = 2,      /* \p{N} */
    CLASS_SPACE = 3,       /* \s */
    CLASS_LATE_NUMBER = 4, /* a number for the Digits splitter, whose Unicode is newer than the regexes' */
} char_class;

/* Class of a code point; anything beyond U+10FFFF is CLASS_OTHER. */
char_class unicode_class(uint32_t code_point);

#endif
