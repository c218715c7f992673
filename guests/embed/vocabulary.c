#include "vocabulary.h"

#include "assets.h"
#include "memory.h"

enum { CONTINUATION_BYTES = 2 }; /* "##" */

static uint32_t *slots; /* open addressing: token + 1, or 0 where free */
static uint32_t slot_mask;
static uint32_t longest_piece;

/* FNV-1a over the text as the vocabulary writes it. */
static uint32_t extend_hash(uint32_t hash, uint8_t byte) {
    return (hash ^ byte) * 16777619u;
}

piece_prefix piece_begin(bool continues_word) {
    uint32_t hash = 2166136261u;
    if (continues_word)
        hash = extend_hash(extend_hash(hash, '#'), '#');
    return (piece_prefix){hash, continues_word};
}

void piece_extend(piece_prefix *prefix, uint8_t byte) {
    prefix->hash = extend_hash(prefix->hash, byte);
}

static bool continues_word(uint32_t token) {
    return token_length(token) > CONTINUATION_BYTES && memcmp(token_text(token), "##", CONTINUATION_BYTES) == 0;
}

/* Slot that holds this piece, or the free one where it belongs. Slots are chosen by the low bits: the high ones are
 * folded down. */
static uint32_t *find_slot(const piece_prefix *prefix, const uint8_t *text, uint32_t length) {
    uint32_t index = (prefix->hash ^ prefix->hash >> 15) & slot_mask;
    uint32_t skipped = prefix->continues_word ? CONTINUATION_BYTES : 0;
    while (slots[index]) {
        uint32_t token = slots[index] - 1;
        if (continues_word(token) == prefix->continues_word && token_length(token) == length + skipped &&
            memcmp(token_text(token) + skipped, text, length) == 0)
            break;
        index = (index + 1) & slot_mask;
    }
    return &slots[index];
}

static bool is_special(uint32_t token) {
    for (uint32_t i = 0; i < tokenizer.header.num_specials; i++)
        if (tokenizer.specials[i] == token)
            return true;
    return false;
}

static void insert(uint32_t token) {
    uint32_t skipped = continues_word(token) ? CONTINUATION_BYTES : 0;
    const uint8_t *text = token_text(token) + skipped;
    uint32_t length = token_length(token) - skipped;
    piece_prefix prefix = piece_begin(skipped != 0);
    for (uint32_t i = 0; i < length; i++)
        piece_extend(&prefix, text[i]);
    uint32_t *slot = find_slot(&prefix, text, length);
    if (*slot == 0) /* of several tokens with one text the first counts */
        *slot = token + 1;
    if (length > longest_piece)
        longest_piece = length;
}

bool vocabulary_index(void) {
    uint32_t num_slots = 16;
    while (num_slots < 2 * (uint64_t)tokenizer.header.num_tokens)
        num_slots *= 2;
    slots = memory_store(num_slots * (uint64_t)sizeof *slots);
    if (!slots)
        return false;
    slot_mask = num_slots - 1;
    for (uint32_t token = 0; token < tokenizer.header.num_tokens; token++)
        if (token_length(token) > 0 && !is_special(token))
            insert(token);
    return true;
}

uint32_t vocabulary_find(const piece_prefix *prefix, const uint8_t *text, uint32_t length) {
    uint32_t slot = *find_slot(prefix, text, length);
    return slot ? slot - 1 : NO_TOKEN;
}

uint32_t vocabulary_longest_piece(void) {
    return longest_piece;
}
