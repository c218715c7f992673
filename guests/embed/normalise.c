#include "normalise.h"

#include "assets.h"
#include "unicode.h"
#include "utf8.h"

enum { REPLACEMENT_CHARACTER = 0xFFFD };

/* The text being written. Marks are put in canonical order as they come: `run` is where those after the last starter
 * begin, whether that starter was written or stripped. */
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

/* A mark goes before those of its run with a higher combining class. Marks have no case. */
static bool append_mark(writer *to, uint32_t mark, uint32_t combining_class) {
    if (!append(to->out, mark))
        return false;
    uint32_t *chars = char_list_data(to->out);
    uint32_t place = to->out->count - 1;
    for (; place > to->run && unicode_combining_class(chars[place - 1]) > combining_class; place--)
        chars[place] = chars[place - 1];
    chars[place] = mark;
    return true;
}

static bool write_stripped(writer *to, uint32_t code_point) {
    uint32_t stripped[MOST_MAPPED];
    uint32_t count = unicode_strip_accents(code_point, stripped);
    if (count == 0 && !(unicode_flags(code_point) & CHAR_COMBINES))
        to->run = to->out->count; /* a stripped mark of class 0 still keeps marks from changing places over it */
    for (uint32_t i = 0; i < count; i++) {
        uint32_t combining_class = unicode_combining_class(stripped[i]);
        if (!(combining_class ? append_mark(to, stripped[i], combining_class) : append_lowered(to->out, stripped[i])))
            return false;
        if (!combining_class)
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
    if (stands_alone && !append(to->out, ' '))
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
    return true;
}
