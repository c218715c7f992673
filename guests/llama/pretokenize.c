#include "pretokenize.h"

#include <stdbool.h>

#include "unicode.h"
#include "utf8.h"

enum { CLASS_END = CLASS_LATE_NUMBER + 1 }; /* no character here: the text is over */

typedef struct {
    const uint8_t *text;
    uint32_t length;
    bool numbers_end; /* SMOLLM: a number ends the text that the regex sees */
} subject;

typedef struct {
    uint32_t class; /* char_class or CLASS_END */
    uint32_t end;   /* where the next character starts */
} character;

static character raw_character(const subject *subject, uint32_t position) {
    if (position >= subject->length)
        return (character){CLASS_END, position};
    uint32_t code_point;
    uint32_t size = utf8_decode(subject->text + position, subject->length - position, &code_point);
    return (character){unicode_class(code_point), position + size};
}

static character character_at(const subject *subject, uint32_t position) {
    character found = raw_character(subject, position);
    bool is_number = found.class == CLASS_NUMBER || found.class == CLASS_LATE_NUMBER;
    if (is_number && subject->numbers_end)
        return (character){CLASS_END, position};
    if (found.class == CLASS_LATE_NUMBER)
        found.class = CLASS_OTHER; /* the regexes' Unicode does not know it as a number */
    return found;
}

static bool is_byte(const subject *subject, uint32_t position, char byte) {
    return position < subject->length && subject->text[position] == (uint8_t)byte;
}

static bool is_line_break(const subject *subject, uint32_t position) {
    return is_byte(subject, position, '\r') || is_byte(subject, position, '\n');
}

/* Whether `letter` (lower case) is at `position`, in either case if `fold`. */
static bool is_letter(const subject *subject, uint32_t position, char letter, bool fold) {
    return is_byte(subject, position, letter) || (fold && is_byte(subject, position, (char)(letter - 'a' + 'A')));
}

/* End of an English contraction at `start`, or `start`. With `fold` as (?i:...) sees it, where U+017F is an s too. */
static uint32_t skip_contraction(const subject *subject, uint32_t start, bool fold) {
    static const char pairs[][2] = {{'l', 'l'}, {'v', 'e'}, {'r', 'e'}};
    if (!is_byte(subject, start, '\''))
        return start;
    for (const char *letter = "sdmt"; *letter; letter++)
        if (is_letter(subject, start + 1, *letter, fold))
            return start + 2;
    if (fold && is_byte(subject, start + 1, '\xC5') && is_byte(subject, start + 2, '\xBF'))
        return start + 3;
    for (uint32_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++)
        if (is_letter(subject, start + 1, pairs[i][0], fold) && is_letter(subject, start + 2, pairs[i][1], fold))
            return start + 3;
    return start;
}

/* End of the run of `class` from `start` on, of at most `most` characters. */
static uint32_t skip_run(const subject *subject, uint32_t start, uint32_t class, uint32_t most) {
    for (; most > 0; most--) {
        character next = character_at(subject, start);
        if (next.class != class)
            break;
        start = next.end;
    }
    return start;
}

/* \s+(?!\S)|\s+ : a run of spaces leaves its last one to the word that follows. */
static uint32_t skip_spaces(const subject *subject, uint32_t start) {
    uint32_t last = start;
    uint32_t end = start;
    character next;
    while ((next = character_at(subject, end)).class == CLASS_SPACE) {
        last = end;
        end = next.end;
    }
    return next.class == CLASS_END || last == start ? end : last;
}

/* \s*[\r\n]+ : up to the last line break of a run of spaces, or `start` if it has none. */
static uint32_t skip_line_breaks(const subject *subject, uint32_t start) {
    uint32_t end = start;
    character next;
    for (uint32_t position = start; (next = character_at(subject, position)).class == CLASS_SPACE; position = next.end)
        if (is_line_break(subject, position))
            end = next.end;
    return end;
}

static uint32_t word_gpt2(const subject *subject, uint32_t start) {
    uint32_t end = skip_contraction(subject, start, false);
    if (end > start)
        return end;
    uint32_t body = is_byte(subject, start, ' ') ? start + 1 : start;
    uint32_t class = character_at(subject, body).class;
    if (class == CLASS_LETTER || class == CLASS_NUMBER || class == CLASS_OTHER)
        return skip_run(subject, body, class, UINT32_MAX);
    return skip_spaces(subject, start);
}

static uint32_t word_smollm(const subject *subject, uint32_t start) {
    if (character_at(subject, start).class == CLASS_END)
        return raw_character(subject, start).end; /* a number */
    return word_gpt2(subject, start);
}

/* LLAMA3 and QWEN2, which differ in how many digits stay together. */
static uint32_t word_llama3(const subject *subject, uint32_t start, uint32_t most_digits) {
    uint32_t end = skip_contraction(subject, start, true);
    if (end > start)
        return end;
    character first = character_at(subject, start);
    if (first.class == CLASS_LETTER)
        return skip_run(subject, start, CLASS_LETTER, UINT32_MAX);
    if (first.class == CLASS_NUMBER)
        return skip_run(subject, start, CLASS_NUMBER, most_digits);
    if (!is_line_break(subject, start) && character_at(subject, first.end).class == CLASS_LETTER)
        return skip_run(subject, first.end, CLASS_LETTER, UINT32_MAX);
    uint32_t body = is_byte(subject, start, ' ') ? start + 1 : start;
    end = skip_run(subject, body, CLASS_OTHER, UINT32_MAX);
    if (end > body) {
        while (is_line_break(subject, end))
            end++;
        return end;
    }
    end = skip_line_breaks(subject, start);
    return end > start ? end : skip_spaces(subject, start);
}

uint32_t pretokenize_word(enum pre_tokenizer rule, const uint8_t *text, uint32_t start, uint32_t length) {
    subject subject = {text, length, rule == PRE_SMOLLM};
    switch (rule) {
    case PRE_GPT2:
        return word_gpt2(&subject, start);
    case PRE_SMOLLM:
        return word_smollm(&subject, start);
    case PRE_LLAMA3:
        return word_llama3(&subject, start, 3);
    case PRE_QWEN2:
        return word_llama3(&subject, start, 1);
    case PRE_NONE:
        break;
    }
    return length;
}
