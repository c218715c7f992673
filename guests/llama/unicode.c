#include "unicode.h"

#include "unicode_tables.h"

enum { NUM_BOUNDARIES = sizeof unicode_boundaries / sizeof unicode_boundaries[0] };

static char_class ascii_class(uint32_t code_point) {
    if (code_point - 'a' < 26 || code_point - 'A' < 26)
        return CLASS_LETTER;
    if (code_point - '0' < 10)
        return CLASS_NUMBER;
    return code_point == ' ' || code_point - '\t' < 5 ? CLASS_SPACE : CLASS_OTHER;
}

char_class unicode_class(uint32_t code_point) {
    if (code_point < 0x80)
        return ascii_class(code_point);
    if (code_point > 0x10FFFF)
        return CLASS_OTHER;
    uint32_t low = 0; /* the last boundary at or below code_point is in [low, high) */
    uint32_t high = NUM_BOUNDARIES;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (unicode_boundaries[middle] >> UNICODE_CLASS_BITS <= code_point)
            low = middle;
        else
            high = middle;
    }
    return (char_class)(unicode_boundaries[low] & ((1u << UNICODE_CLASS_BITS) - 1));
}
