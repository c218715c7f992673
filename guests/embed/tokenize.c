#include "tokenize.h"

#include "assets.h"
#include "glowplug.h"
#include "normalise.h"
#include "special_tokens.h"
#include "unicode.h"
#include "wordpiece.h"

/* BERT's pre-tokeniser: words lie between white space, and each punctuation mark is one of its own. */
static bool encode_words(const uint32_t *chars, uint32_t count, token_list *out) {
    uint32_t start = 0; /* of the word that is being read */
    for (uint32_t i = 0; i < count; i++) {
        uint32_t flags = unicode_flags(chars[i]);
        if (!(flags & (CHAR_SPACE | CHAR_PUNCTUATION)))
            continue;
        if (i > start && !wordpiece_encode(chars + start, i - start, out))
            return false;
        if (flags & CHAR_PUNCTUATION && !wordpiece_encode(chars + i, 1, out))
            return false;
        start = i + 1;
    }
    return start == count || wordpiece_encode(chars + start, count - start, out);
}

/* A stretch without special tokens. */
static bool encode_plain(const uint8_t *text, uint32_t length, token_list *out) {
    static char_list normalised;
    return normalise(text, length, &normalised) &&
           encode_words(char_list_data(&normalised), normalised.count, out);
}

bool tokenize(const uint8_t *text, uint32_t length, uint32_t flags, token_list *out) {
    out->count = 0;
    if (flags & GP_ADD_SPECIAL && !token_list_append(out, tokenizer.header.first_token))
        return false;
    for (uint32_t start = 0; start < length;) {
        special_match special = {NO_TOKEN, length, length};
        if (flags & GP_PARSE_SPECIAL)
            special = special_tokens_find(text, start, length);
        if (!encode_plain(text + start, special.start - start, out))
            return false;
        if (special.token != NO_TOKEN && !token_list_append(out, special.token))
            return false;
        start = special.end;
    }
    return !(flags & GP_ADD_SPECIAL) || token_list_append(out, tokenizer.header.last_token);
}
