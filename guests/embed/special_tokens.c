#include "special_tokens.h"

#include "assets.h"
#include "memory.h"

/* A model has a handful of them: trying each where its first byte stands is as fast as an index. */
static uint32_t match_here(const uint8_t *text, uint32_t length) {
    uint32_t best = NO_TOKEN;
    for (uint32_t i = 0; i < tokenizer.header.num_specials; i++) {
        uint32_t token = tokenizer.specials[i];
        uint32_t size = token_length(token);
        if (size <= length && token_text(token)[0] == text[0] && memcmp(token_text(token), text, size) == 0 &&
            (best == NO_TOKEN || size > token_length(best)))
            best = token;
    }
    return best;
}

special_match special_tokens_find(const uint8_t *text, uint32_t start, uint32_t length) {
    for (; start < length; start++) {
        uint32_t token = match_here(text + start, length - start);
        if (token != NO_TOKEN)
            return (special_match){token, start, start + token_length(token)};
    }
    return (special_match){NO_TOKEN, length, length};
}
