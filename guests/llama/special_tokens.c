#include "special_tokens.h"

#include "assets.h"
#include "memory.h"

static bool starts_special[256]; /* first bytes of special tokens */

static int compare_texts(uint32_t left, uint32_t right) {
    uint32_t shorter = token_length(left) < token_length(right) ? token_length(left) : token_length(right);
    int order = memcmp(token_text(left), token_text(right), shorter);
    if (order == 0)
        order = token_length(left) < token_length(right) ? -1 : token_length(left) > token_length(right);
    return order;
}

bool special_tokens_index(void) {
    for (uint32_t i = 0; i < tokenizer.header.num_specials; i++) {
        uint32_t token = tokenizer.specials[i];
        if (token_length(token) == 0 || (i > 0 && compare_texts(tokenizer.specials[i - 1], token) > 0))
            return false;
        starts_special[token_text(token)[0]] = true;
    }
    return true;
}

/* Tokens of tokenizer.specials that share a prefix: they are neighbours, because the list is sorted. */
typedef struct {
    uint32_t first;
    uint32_t end;
} candidates;

/* First of the candidates whose byte at `depth` is at least `byte`; one that ends before `depth` comes before all. */
static uint32_t lower_bound(candidates range, uint32_t depth, uint32_t byte) {
    while (range.first < range.end) {
        uint32_t middle = range.first + (range.end - range.first) / 2;
        uint32_t token = tokenizer.specials[middle];
        if (token_length(token) <= depth || token_text(token)[depth] < byte)
            range.first = middle + 1;
        else
            range.end = middle;
    }
    return range.first;
}

/* A candidate of exactly `length` bytes that may be used; such candidates come first. */
static uint32_t pick(candidates range, uint32_t length, bool parse_special) {
    for (uint32_t i = range.first; i < range.end && token_length(tokenizer.specials[i]) == length; i++)
        if (parse_special || tokenizer.kinds[tokenizer.specials[i]] == TOKEN_USER_DEFINED)
            return tokenizer.specials[i];
    return NO_TOKEN;
}

static special_match match_here(const uint8_t *text, uint32_t start, uint32_t length, bool parse_special) {
    special_match best = {NO_TOKEN, start, start};
    candidates range = {0, tokenizer.header.num_specials};
    for (uint32_t end = start; end < length && range.first < range.end; end++) {
        uint32_t depth = end - start;
        range.first = lower_bound(range, depth, text[end]);
        range.end = lower_bound(range, depth, text[end] + 1u);
        uint32_t token = pick(range, depth + 1, parse_special);
        if (token != NO_TOKEN)
            best = (special_match){token, start, end + 1};
    }
    return best;
}

special_match special_tokens_find(const uint8_t *text, uint32_t start, uint32_t length, bool parse_special) {
    for (; start < length; start++) {
        if (!starts_special[text[start]])
            continue;
        special_match match = match_here(text, start, length, parse_special);
        if (match.token != NO_TOKEN)
            return match;
    }
    return (special_match){NO_TOKEN, length, length};
}
