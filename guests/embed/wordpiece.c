#include "wordpiece.h"

#include "assets.h"
#include "vocabulary.h"

enum { MOST_CHAR_BYTES = 4 };

/* A word as UTF-8: character i is the bytes from starts[i] to starts[i + 1]. */
typedef struct {
    uint8_t text[WORD_MOST_CHARS * MOST_CHAR_BYTES];
    uint32_t starts[WORD_MOST_CHARS + 1];
} encoded_word;

static encoded_word scratch;

static uint32_t write_utf8(uint32_t code_point, uint8_t *out) {
    if (code_point < 0x80) {
        out[0] = (uint8_t)code_point;
        return 1;
    }
    uint32_t num_following = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
    out[0] = (uint8_t)(0xF80u >> num_following | code_point >> 6 * num_following);
    for (uint32_t i = 1; i <= num_following; i++)
        out[i] = (uint8_t)(0x80 | (code_point >> 6 * (num_following - i) & 0x3F));
    return num_following + 1;
}

static void encode(const uint32_t *word, uint32_t count) {
    uint32_t length = 0;
    for (uint32_t i = 0; i < count; i++) {
        scratch.starts[i] = length;
        length += write_utf8(word[i], scratch.text + length);
    }
    scratch.starts[count] = length;
}

/* The longest piece that begins at character `first`; `end` is set to the character behind it. */
static uint32_t longest_piece(uint32_t first, uint32_t count, uint32_t *end) {
    uint32_t begin = scratch.starts[first];
    piece_prefix prefix = piece_begin(first > 0);
    uint32_t best = NO_TOKEN;
    for (uint32_t i = first; i < count; i++) {
        uint32_t length = scratch.starts[i + 1] - begin;
        if (length > vocabulary_longest_piece())
            break;
        for (uint32_t byte = scratch.starts[i]; byte < scratch.starts[i + 1]; byte++)
            piece_extend(&prefix, scratch.text[byte]);
        uint32_t token = vocabulary_find(&prefix, scratch.text + begin, length);
        if (token != NO_TOKEN) {
            best = token;
            *end = i + 1;
        }
    }
    return best;
}

bool wordpiece_encode(const uint32_t *word, uint32_t count, token_list *out) {
    uint32_t num_before = out->count;
    if (count > tokenizer.header.most_word_chars)
        return token_list_append(out, tokenizer.header.unknown_token);
    encode(word, count);
    for (uint32_t first = 0; first < count;) {
        uint32_t token = longest_piece(first, count, &first);
        if (token == NO_TOKEN) {
            out->count = num_before; /* all of the word is unknown, not only the rest */
            return token_list_append(out, tokenizer.header.unknown_token);
        }
        if (!token_list_append(out, token))
            return false;
    }
    return true;
}
