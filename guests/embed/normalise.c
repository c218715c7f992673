#include "normalise.h"

#include "assets.h"
#include "unicode.h"
#include "utf8.h"

enum { REPLACEMENT_CHARACTER = 0xFFFD, NUM_CLASSES = 256 };

/* The text being written. `run` is where the marks after the last starter begin, whether that starter was written or
 * stripped; they are put in canonical order when the next one comes. Only where accents are stripped. */
typedef struct {
    char_list *out;
    uint32_t run;
} writer;

static bool reserve_one(char_list *list) {
    uint64_t used = (uint64_t)list->count * sizeof(uint32_t);
    return used + sizeof(uint32_t) <= list->memory.capacity ||
           buffer_reserve(&list->memory, used, used + sizeof(uint32_t));
}

static bool append(char_list *list, uint32_t code_point) {
    if (!reserve_one(list))
        return false;
    char_list_data(list)[list->count++] = code_point;
    return true;
}

static bool append_lowered(char_list *list, uint32_t code_point) {
    uint32_t lowered[MOST_MAPPED];
    if (!tokenizer_has(TOKENIZER_LOWERCASE))
        return append(list, code_point);
    uint32_t count = unicode_lowercase(code_point, lowered);
    for (uint32_t i = 0; i < count; i++)
        if (!append(list, lowered[i]))
            return false;
    return true;
}

/* Order the marks of the run by combining class, those of one class as they came; the next run begins behind them.
 * Counting, because a hostile text may be one run. */
static bool end_run(writer *to) {
    static buffer ordered;
    uint32_t places[NUM_CLASSES + 1] = {0};
    uint32_t count = to->out->count - to->run;
    uint32_t *marks = char_list_data(to->out) + to->run;
    if (!tokenizer_has(TOKENIZER_STRIP_ACCENTS) || count < 2) {
        to->run = to->out->count;
        return true;
    }
    if (!buffer_reserve(&ordered, 0, (uint64_t)count * sizeof *marks))
        return false;
    for (uint32_t i = 0; i < count; i++)
        places[unicode_combining_class(marks[i]) + 1]++;
    for (uint32_t i = 1; i < NUM_CLASSES; i++)
        places[i] += places[i - 1];
    uint32_t *sorted = ordered.data;
    for (uint32_t i = 0; i < count; i++)
        sorted[places[unicode_combining_class(marks[i])]++] = marks[i];
    memcpy(marks, sorted, (size_t)count * sizeof *marks);
    to->run = to->out->count;
    return true;
}

static bool write_stripped(writer *to, uint32_t code_point) {
    uint32_t stripped[MOST_MAPPED];
    uint32_t count = unicode_strip_accents(code_point, stripped);
    if (count == 0 && !(unicode_flags(code_point) & CHAR_COMBINES))
        return end_run(to); /* a stripped mark of class 0 still keeps marks from changing places over it */
    for (uint32_t i = 0; i < count; i++) {
        bool is_mark = unicode_combining_class(stripped[i]) != 0;
        if (!(is_mark ? append(to->out, stripped[i]) : end_run(to) && append_lowered(to->out, stripped[i])))
            return false;
        if (!is_mark)
            to->run = to->out->count;
    }
    return true;
}

static bool write_char(writer *to, uint32_t code_point) {
    uint32_t flags = unicode_flags(code_point);
    if (tokenizer_has(TOKENIZER_CLEAN_TEXT)) {
        if (flags & CHAR_CLEANED_AWAY)
            return true;
        if (flags & CHAR_CLEANED_SPACE)
            code_point = ' ';
    }
    bool stands_alone = tokenizer_has(TOKENIZER_SPACE_CJK) && flags & CHAR_CJK;
    if (stands_alone && !(end_run(to) && append(to->out, ' ')))
        return false;
    if (!(tokenizer_has(TOKENIZER_STRIP_ACCENTS) ? write_stripped(to, code_point)
                                                 : append_lowered(to->out, code_point)))
        return false;
    if (!stands_alone)
        return true;
    if (!append(to->out, ' '))
        return false;
    to->run = to->out->count;
    return true;
}

bool normalise(const uint8_t *text, uint32_t length, char_list *out) {
    writer to = {.out = out, .run = 0};
    out->count = 0;
    for (uint32_t position = 0; position < length;) {
        uint32_t code_point;
        position += utf8_decode(text + position, length - position, &code_point);
        if (!write_char(&to, code_point == UTF8_INVALID ? REPLACEMENT_CHARACTER : code_point))
            return false;
    }
    return end_run(&to);
}
