#include "merges.h"

#include "memory.h"

typedef struct {
    uint32_t left; /* NO_TOKEN: free */
    uint32_t right;
    uint32_t merged;
    uint32_t rank;
} merge_slot;

static merge_slot *slots;
static uint32_t slot_mask;
static uint32_t hash_shift;

bool merges_create(uint32_t num_merges) {
    uint32_t bits = 4;
    while ((1ull << bits) < 2 * (uint64_t)num_merges)
        bits++;
    uint64_t size = sizeof *slots << bits;
    slots = memory_store(size);
    if (!slots)
        return false;
    memset(slots, 0xFF, (size_t)size);
    slot_mask = (1u << bits) - 1;
    hash_shift = 64 - bits;
    return true;
}

/* Slot that holds this pair, or the free one where it belongs. Multiplicative hashing: the high bits are the good
 * ones. Source: Knuth, The Art of Computer Programming, volume 3, section 6.4. */
static merge_slot *find_slot(uint32_t left, uint32_t right) {
    uint64_t key = (uint64_t)left << 32 | right;
    uint32_t index = (uint32_t)((key ^ key >> 29) * 0x9E3779B97F4A7C15ull >> hash_shift);
    while (slots[index].left != NO_TOKEN && (slots[index].left != left || slots[index].right != right))
        index = (index + 1) & slot_mask;
    return &slots[index];
}

void merges_insert(const merge *entry, uint32_t rank) {
    merge_slot *slot = find_slot(entry->left, entry->right);
    if (slot->left == NO_TOKEN)
        *slot = (merge_slot){entry->left, entry->right, entry->merged, rank};
}

uint32_t merges_find(uint32_t left, uint32_t right, uint32_t *rank) {
    if (left == NO_TOKEN)
        return NO_TOKEN;
    const merge_slot *slot = find_slot(left, right);
    if (slot->left == NO_TOKEN)
        return NO_TOKEN;
    *rank = slot->rank;
    return slot->merged;
}
