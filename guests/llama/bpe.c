#include "bpe.h"

#include "assets.h"
#include "merges.h"
#include "utf8.h"
#include "vocabulary.h"

#define NO_SYMBOL 0xFFFFFFFFu

/* A stretch of the word: it reaches from `start` to the start of the next symbol. */
typedef struct {
    uint32_t token; /* NO_TOKEN: text that the vocabulary lacks */
    uint32_t start;
    uint32_t previous; /* indices; a symbol that was merged into its left neighbour is no longer linked */
    uint32_t next;
} symbol;

/* Merge of the symbol `left` with its right neighbour. Symbols only ever grow, so the merge is still possible exactly
 * when the neighbour still ends at `end`: no other bookkeeping is needed to notice a stale candidate. */
typedef struct {
    uint32_t priority; /* lower first, then from left to right */
    uint32_t left;
    uint32_t end;
    uint32_t merged;
} candidate;

typedef struct {
    const uint8_t *text;
    uint32_t length;
    symbol *symbols;
    uint32_t num_symbols;
    candidate *heap;
    uint32_t num_candidates;
} word;

static buffer symbol_memory;
static buffer heap_memory;

static bool is_before(const candidate *a, const candidate *b) {
    return a->priority < b->priority || (a->priority == b->priority && a->left < b->left);
}

static void heap_push(word *word, candidate added) {
    uint32_t hole = word->num_candidates++;
    while (hole > 0 && is_before(&added, &word->heap[(hole - 1) / 2])) {
        word->heap[hole] = word->heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    word->heap[hole] = added;
}

static candidate heap_pop(word *word) {
    candidate top = word->heap[0];
    candidate moved = word->heap[--word->num_candidates];
    uint32_t hole = 0;
    for (uint32_t child; (child = 2 * hole + 1) < word->num_candidates; hole = child) {
        if (child + 1 < word->num_candidates && is_before(&word->heap[child + 1], &word->heap[child]))
            child++;
        if (!is_before(&word->heap[child], &moved))
            break;
        word->heap[hole] = word->heap[child];
    }
    word->heap[hole] = moved;
    return top;
}

static uint32_t symbol_end(const word *word, uint32_t index) {
    uint32_t next = word->symbols[index].next;
    return next == NO_SYMBOL ? word->length : word->symbols[next].start;
}

/* What the symbol `left` and its right neighbour `right` merge into, or NO_TOKEN. */
static uint32_t find_merge(const word *word, uint32_t left, uint32_t right, uint32_t *priority) {
    const symbol *symbols = word->symbols;
    if (!tokenizer.priorities)
        return merges_find(symbols[left].token, symbols[right].token, priority);
    uint32_t start = symbols[left].start;
    uint32_t merged = vocabulary_find(word->text + start, symbol_end(word, right) - start);
    if (merged != NO_TOKEN)
        *priority = tokenizer.priorities[merged];
    return merged;
}

static void consider(word *word, uint32_t left) {
    uint32_t right = left == NO_SYMBOL ? NO_SYMBOL : word->symbols[left].next;
    if (right == NO_SYMBOL)
        return;
    uint32_t priority;
    uint32_t merged = find_merge(word, left, right, &priority);
    if (merged != NO_TOKEN)
        heap_push(word, (candidate){priority, left, symbol_end(word, right), merged});
}

static void add_symbol(word *word, uint32_t token, uint32_t start) {
    uint32_t index = word->num_symbols++;
    word->symbols[index] = (symbol){token, start, index - 1, index + 1}; /* index 0: previous is NO_SYMBOL */
}

static void split_bytes(word *word) {
    for (uint32_t i = 0; i < word->length; i++) {
        uint32_t token = vocabulary_byte_token(word->text[i]);
        if (token != NO_TOKEN)
            add_symbol(word, token, i);
    }
}

static void split_characters(word *word) {
    for (uint32_t i = 0; i < word->length;) {
        uint32_t code_point;
        uint32_t size = utf8_decode(word->text + i, word->length - i, &code_point);
        add_symbol(word, vocabulary_find(word->text + i, size), i);
        i += size;
    }
}

static void merge_all(word *word) {
    symbol *symbols = word->symbols;
    for (uint32_t i = 0; i + 1 < word->num_symbols; i++)
        consider(word, i);
    while (word->num_candidates) {
        candidate best = heap_pop(word);
        symbol *left = &symbols[best.left];
        if (left->start == NO_SYMBOL || left->next == NO_SYMBOL || symbol_end(word, left->next) != best.end)
            continue;
        symbol *right = &symbols[left->next];
        left->token = best.merged;
        left->next = right->next;
        right->start = NO_SYMBOL;
        if (left->next != NO_SYMBOL)
            symbols[left->next].previous = best.left;
        consider(word, left->previous);
        consider(word, best.left);
    }
}

static bool has_byte_tokens(const uint8_t *text, uint32_t length) {
    for (uint32_t i = 0; i < length; i++)
        if (vocabulary_byte_token(text[i]) == NO_TOKEN)
            return false;
    return true;
}

static bool append_bytes(const uint8_t *text, uint32_t length, token_list *out) {
    for (uint32_t i = 0; i < length; i++)
        if (!token_list_append(out, vocabulary_byte_token(text[i])))
            return false;
    return true;
}

static bool append_symbols(const word *word, token_list *out) {
    bool after_unknown = false;
    for (uint32_t i = 0; i != NO_SYMBOL; i = word->symbols[i].next) {
        const symbol *symbol = &word->symbols[i];
        const uint8_t *text = word->text + symbol->start;
        uint32_t length = symbol_end(word, i) - symbol->start;
        bool done = true;
        bool unknown = false;
        if (symbol->token != NO_TOKEN)
            done = token_list_append(out, symbol->token);
        else if (has_byte_tokens(text, length))
            done = append_bytes(text, length, out);
        else if ((unknown = tokenizer.header.unknown_token != NO_TOKEN) && !after_unknown)
            done = token_list_append(out, tokenizer.header.unknown_token);
        if (!done)
            return false;
        after_unknown = unknown;
    }
    return true;
}

bool bpe_encode(const uint8_t *text, uint32_t length, token_list *out) {
    if (length == 0)
        return true;
    if (tokenizer_has(TOKENIZER_IGNORE_MERGES)) {
        uint32_t whole = vocabulary_find(text, length);
        if (whole != NO_TOKEN)
            return token_list_append(out, whole);
    }
    /* Each merge takes one candidate out and puts at most two in, so 2 * length bounds the heap. */
    if (length > BPE_LONGEST_WORD_BYTES || !buffer_reserve(&symbol_memory, 0, length * (uint64_t)sizeof(symbol)) ||
        !buffer_reserve(&heap_memory, 0, length * (uint64_t)(2 * sizeof(candidate))))
        return false;
    word word = {.text = text, .length = length, .symbols = symbol_memory.data, .heap = heap_memory.data};
    if (tokenizer.header.kind == BYTE_LEVEL_BPE)
        split_bytes(&word);
    else
        split_characters(&word);
    if (word.num_symbols == 0)
        return true;
    word.symbols[word.num_symbols - 1].next = NO_SYMBOL;
    merge_all(&word);
    return append_symbols(&word, out);
}
