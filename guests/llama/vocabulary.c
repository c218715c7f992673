#include "vocabulary.h"

#include "assets.h"
#include "memory.h"

static uint32_t byte_tokens[256];
static uint32_t *slots; /* open addressing: token + 1, or 0 where free */
static uint32_t slot_mask;
static uint32_t longest_token; /* bytes */

/* FNV-1a, with the high bits folded down because slots are chosen by the low ones. */
static uint32_t hash_text(const uint8_t *text, uint32_t length) {
    uint32_t hash = 2166136261u;
    for (uint32_t i = 0; i < length; i++)
        hash = (hash ^ text[i]) * 16777619u;
    return hash ^ hash >> 15;
}

static bool is_ordinary(uint32_t token) {
    return tokenizer.kinds[token] == TOKEN_NORMAL || tokenizer.kinds[token] == TOKEN_USER_DEFINED;
}

/* Slot that holds this text, or the free one where it belongs. */
static uint32_t *find_slot(const uint8_t *text, uint32_t length) {
    uint32_t index = hash_text(text, length) & slot_mask;
    while (slots[index]) {
        uint32_t token = slots[index] - 1;
        if (token_length(token) == length && memcmp(token_text(token), text, length) == 0)
            break;
        index = (index + 1) & slot_mask;
    }
    return &slots[index];
}

static bool index_texts(void) {
    uint32_t num_slots = 16;
    while (num_slots < 2 * (uint64_t)tokenizer.header.num_tokens)
        num_slots *= 2;
    slots = memory_store(num_slots * (uint64_t)sizeof *slots);
    if (!slots)
        return false;
    slot_mask = num_slots - 1;
    for (uint32_t token = 0; token < tokenizer.header.num_tokens; token++) {
        if (!is_ordinary(token) || token_length(token) == 0)
            continue;
        uint32_t *slot = find_slot(token_text(token), token_length(token));
        if (*slot == 0) /* of several tokens with one text the first counts */
            *slot = token + 1;
        if (token_length(token) > longest_token)
            longest_token = token_length(token);
    }
    return true;
}

static void index_bytes(void) {
    uint32_t kind = tokenizer.header.kind == BYTE_LEVEL_BPE ? TOKEN_NORMAL : TOKEN_BYTE;
    memset(byte_tokens, 0xFF, sizeof byte_tokens); /* NO_TOKEN */
    for (uint32_t token = 0; token < tokenizer.header.num_tokens; token++)
        if (tokenizer.kinds[token] == kind && token_length(token) == 1 &&
            byte_tokens[token_text(token)[0]] == NO_TOKEN)
            byte_tokens[token_text(token)[0]] = token;
}

bool vocabulary_index(void) {
    index_bytes();
    if (tokenizer.header.kind == SENTENCEPIECE_BPE || tokenizer_has(TOKENIZER_IGNORE_MERGES))
        return index_texts();
    return true;
}

uint32_t vocabulary_find(const uint8_t *text, uint32_t length) {
    if (length == 0 || length > longest_token)
        return NO_TOKEN;
    uint32_t slot = *find_slot(text, length);
    return slot ? slot - 1 : NO_TOKEN;
}

uint32_t vocabulary_byte_token(uint8_t byte) {
    return byte_tokens[byte];
}
