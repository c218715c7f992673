#include "memory.h"

enum {
    ALIGNMENT = 16,
    HEADER_BYTES = 16, /* keeps a block aligned; holds its size class */
    SMALLEST_CLASS = 6,
    LARGEST_CLASS = 31,
    WASM_PAGE_BYTES = 65536,
};

typedef struct free_block {
    uint32_t size_class;
    struct free_block *next;
} free_block;

extern uint8_t __heap_base; /* set by the linker: first byte above stack and data */

static uint64_t bump_top; /* address of the next free byte; 0 before the first use */
static free_block *free_blocks[LARGEST_CLASS + 1];

/* With bulk_memory these compile to the memory.copy and memory.fill instructions. */
void *memcpy(void *destination, const void *source, size_t size) {
    return __builtin_memmove(destination, source, size);
}

void *memmove(void *destination, const void *source, size_t size) {
    return __builtin_memmove(destination, source, size);
}

void *memset(void *destination, int byte, size_t size) {
    return __builtin_memset(destination, byte, size);
}

int memcmp(const void *left, const void *right, size_t size) {
    const uint8_t *a = left;
    const uint8_t *b = right;
    for (size_t i = 0; i < size; i++)
        if (a[i] != b[i])
            return a[i] < b[i] ? -1 : 1;
    return 0;
}

static void *bump(uint64_t size) {
    if (bump_top == 0)
        bump_top = (uintptr_t)&__heap_base;
    uint64_t start = (bump_top + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
    uint64_t end = start + size;
    uint64_t pages = (end + WASM_PAGE_BYTES - 1) / WASM_PAGE_BYTES;
    uint64_t pages_now = __builtin_wasm_memory_size(0);
    if (pages > WASM_PAGE_BYTES)
        return NULL; /* beyond 4 GiB */
    if (pages > pages_now && __builtin_wasm_memory_grow(0, (size_t)(pages - pages_now)) == SIZE_MAX)
        return NULL;
    bump_top = end;
    return (void *)(uintptr_t)start;
}

void *memory_store(uint64_t size) {
    return bump(size); /* fresh linear memory is zero */
}

void *memory_take(uint64_t size) {
    uint32_t size_class = SMALLEST_CLASS;
    while (size_class <= LARGEST_CLASS && (1ull << size_class) < size + HEADER_BYTES)
        size_class++;
    if (size_class > LARGEST_CLASS)
        return NULL;
    free_block *block = free_blocks[size_class];
    if (block)
        free_blocks[size_class] = block->next;
    else
        block = bump(1ull << size_class);
    if (!block)
        return NULL;
    block->size_class = size_class;
    return (uint8_t *)block + HEADER_BYTES;
}

void memory_give(void *pointer) {
    if (!pointer)
        return;
    free_block *block = (free_block *)((uint8_t *)pointer - HEADER_BYTES);
    block->next = free_blocks[block->size_class];
    free_blocks[block->size_class] = block;
}

bool buffer_reserve(buffer *scratch, uint64_t used, uint64_t size) {
    if (size <= scratch->capacity)
        return true;
    if (used == 0) { /* nothing to keep: the old block may serve someone else at once */
        memory_give(scratch->data);
        *scratch = (buffer){0};
    }
    void *data = memory_take(size);
    if (!data)
        return false;
    if (used) {
        memcpy(data, scratch->data, (size_t)used);
        memory_give(scratch->data);
    }
    uint32_t size_class = ((free_block *)((uint8_t *)data - HEADER_BYTES))->size_class;
    *scratch = (buffer){data, (1ull << size_class) - HEADER_BYTES};
    return true;
}

bool token_list_append(token_list *list, uint32_t token) {
    uint64_t used = (uint64_t)list->count * sizeof(uint32_t);
    if (used + sizeof(uint32_t) > list->memory.capacity &&
        !buffer_reserve(&list->memory, used, used + sizeof(uint32_t)))
        return false;
    ((uint32_t *)list->memory.data)[list->count++] = token;
    return true;
}
