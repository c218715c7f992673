#include "tokenize.h"

#include "assets.h"
#include "bpe.h"
#include "glowplug.h"
#include "nfc.h"
#include "pretokenize.h"
#include "special_tokens.h"

static bool encode_byte_level(const uint8_t *text, uint32_t length, token_list *out) {
    if (tokenizer_has(TOKENIZER_NFC) && !nfc_normalise(&text, &length))
        return false;
    for (uint32_t start = 0; start < length;) {
        uint32_t end = pretokenize_word(tokenizer.header.pre_tokenizer, text, start, length);
        if (!bpe_encode(text + start, end - start, out))
            return false;
        start = end;
    }
    return true;
}

/* Whether a stretch that begins with `first_byte` gets a dummy prefix; `is_first`: it begins the text. */
static bool wants_prefix(uint8_t first_byte, bool is_first) {
    return tokenizer_has(TOKENIZER_ADD_SPACE_PREFIX) &&
           (is_first || !tokenizer_has(TOKENIZER_SPACE_PREFIX_ONCE)) &&
           (first_byte != ' ' || !tokenizer_has(TOKENIZER_SPACE_PREFIX_IF_MISSING));
}

/* The vocabulary holds spaces where the model's file has U+2581, so it is the rare U+2581 of a text that changes: it
 * means the same as a space. The whole stretch is one word. */
static bool encode_sentencepiece(const uint8_t *text, uint32_t length, bool is_first, token_list *out) {
    static buffer normalised;
    if (!buffer_reserve(&normalised, 0, (uint64_t)length + 1))
        return false;
    uint8_t *to = normalised.data;
    uint32_t size = 0;
    to[size++] = ' '; /* the dummy prefix, skipped below where it is not wanted */
    for (uint32_t i = 0; i < length;) {
        bool is_marker = length - i >= 3 && memcmp(text + i, "\xE2\x96\x81", 3) == 0;
        to[size++] = is_marker ? ' ' : text[i];
        i += is_marker ? 3 : 1;
    }
    uint32_t skipped = wants_prefix(to[1], is_first) ? 0 : 1;
    return bpe_encode(to + skipped, size - skipped, out);
}

/* A stretch without special tokens; `is_first`: it begins the text. */
static bool encode_plain(const uint8_t *text, uint32_t length, bool is_first, token_list *out) {
    if (length == 0)
        return true;
    if (tokenizer.header.kind == SENTENCEPIECE_BPE)
        return encode_sentencepiece(text, length, is_first, out);
    return encode_byte_level(text, length, out);
}

bool tokenize(const uint8_t *text, uint32_t length, uint32_t flags, token_list *out) {
    out->count = 0;
    bool adds_bos = (flags & GP_ADD_SPECIAL) && tokenizer_has(TOKENIZER_ADD_BOS);
    if (adds_bos && !token_list_append(out, tokenizer.header.bos_token))
        return false;
    for (uint32_t start = 0; start < length;) {
        special_match special = special_tokens_find(text, start, length, (flags & GP_PARSE_SPECIAL) != 0);
        if (!encode_plain(text + start, special.start - start, start == 0, out))
            return false;
        if (special.token != NO_TOKEN && !token_list_append(out, special.token))
            return false;
        start = special.end;
    }
    return true;
}
