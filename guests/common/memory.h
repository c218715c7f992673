/* Linear memory: permanent tables made at init, and blocks that are given back and reused.
 *
 * Both come from one bump pointer above the stack and the data segment. What gp_init stores is never freed and becomes
 * part of the snapshot. Blocks come in powers of two with one free list a size, so a guest that serves for weeks
 * holds at most about twice what its largest calls needed. Nothing is ever returned to the host: memory cannot shrink.
 */
#ifndef COMMON_MEMORY_H
#define COMMON_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *destination, const void *source, size_t size);
void *memmove(void *destination, const void *source, size_t size);
void *memset(void *destination, int byte, size_t size);
int memcmp(const void *left, const void *right, size_t size);

/* Zeroed memory for good, 16-byte aligned; NULL: the host grants no more. Init only. */
void *memory_store(uint64_t size);

/* A block of at least `size` bytes, contents undefined, 16-byte aligned; NULL: the host grants no more. */
void *memory_take(uint64_t size);

/* Give back a block of memory_take. NULL is allowed. */
void memory_give(void *block);

/* Scratch memory that lives from call to call and only grows. */
typedef struct {
    void *data;
    uint64_t capacity; /* bytes */
} buffer;

/* Make room for `size` bytes, of which the first `used` survive. False: out of memory; what was used is still there. */
bool buffer_reserve(buffer *scratch, uint64_t used, uint64_t size);

/* Token ids under construction. */
typedef struct {
    buffer memory;
    uint32_t count;
} token_list;

bool token_list_append(token_list *list, uint32_t token);

#endif
