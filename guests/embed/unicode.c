#include "unicode.h"

#include "memory.h"

/* `num_mapped` code points from `first` on in a table of results. */
typedef struct {
    uint32_t code_point;
    uint16_t first;
    uint16_t num_mapped;
} mapping;

#include "unicode_tables.h"

#define LENGTH_OF(array) (sizeof(array) / sizeof(array)[0])

enum {
    FIRST_LETTER_A = 'A',
    NUM_LETTERS = 26,
    ASCII_END = 0x80,
    CLASS_BITS = 8,
    /* Source: Unicode 16, section 3.12, Hangul syllable decomposition. */
    HANGUL_FIRST = 0xAC00,
    HANGUL_COUNT = 11172,
    LEADING_FIRST = 0x1100,
    VOWEL_FIRST = 0x1161,
    TRAILING_BASE = 0x11A7,
    VOWEL_COUNT = 21,
    TRAILING_COUNT = 28,
};

/* Index of the last entry whose upper bits are at or below `key`; the first entry is. */
static uint32_t last_at_or_below(const uint32_t *entries, uint32_t count, uint32_t shift, uint32_t key) {
    uint32_t low = 0;
    uint32_t high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (entries[middle] >> shift <= key)
            low = middle;
        else
            high = middle;
    }
    return low;
}

uint32_t unicode_flags(uint32_t code_point) {
    if (code_point > 0x10FFFF)
        return 0;
    uint32_t index = last_at_or_below(unicode_flag_runs, LENGTH_OF(unicode_flag_runs), CLASS_BITS, code_point);
    return unicode_flag_runs[index] & ((1u << CLASS_BITS) - 1);
}

uint32_t unicode_combining_class(uint32_t code_point) {
    uint32_t index = last_at_or_below(unicode_combining, LENGTH_OF(unicode_combining), CLASS_BITS, code_point);
    uint32_t entry = unicode_combining[index];
    return entry >> CLASS_BITS == code_point ? entry & ((1u << CLASS_BITS) - 1) : 0;
}

static uint32_t map(const mapping *entries, uint32_t count, const uint32_t *results, uint32_t code_point,
                    uint32_t mapped[MOST_MAPPED]) {
    uint32_t low = 0;
    uint32_t high = count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (entries[middle].code_point < code_point)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == count || entries[low].code_point != code_point) {
        mapped[0] = code_point;
        return 1;
    }
    memcpy(mapped, results + entries[low].first, entries[low].num_mapped * sizeof *mapped);
    return entries[low].num_mapped;
}

uint32_t unicode_strip_accents(uint32_t code_point, uint32_t mapped[MOST_MAPPED]) {
    mapped[0] = code_point;
    if (code_point < ASCII_END)
        return 1;
    uint32_t syllable = code_point - HANGUL_FIRST;
    if (syllable < HANGUL_COUNT) {
        uint32_t trailing = syllable % TRAILING_COUNT;
        mapped[0] = LEADING_FIRST + syllable / (VOWEL_COUNT * TRAILING_COUNT);
        mapped[1] = VOWEL_FIRST + syllable / TRAILING_COUNT % VOWEL_COUNT;
        mapped[2] = TRAILING_BASE + trailing;
        return trailing ? 3 : 2;
    }
    if (unicode_flags(code_point) & CHAR_STRIPPED)
        return 0;
    return map(unicode_stripped, LENGTH_OF(unicode_stripped), unicode_stripped_results, code_point, mapped);
}

uint32_t unicode_lowercase(uint32_t code_point, uint32_t mapped[MOST_MAPPED]) {
    if (code_point < ASCII_END) {
        mapped[0] = code_point - FIRST_LETTER_A < NUM_LETTERS ? code_point + ('a' - 'A') : code_point;
        return 1;
    }
    return map(unicode_lowered, LENGTH_OF(unicode_lowered), unicode_lowered_results, code_point, mapped);
}
