/* Reading an asset of the host from front to back during init; every failure is one line in the log. */
#ifndef COMMON_ASSET_READER_H
#define COMMON_ASSET_READER_H

#include <stdbool.h>
#include <stdint.h>

/* An asset being read from front to back. */
typedef struct {
    const char *name;
    uint32_t name_length;
    uint64_t size;
    uint64_t position;
} asset_reader;

/* Log the reason; always false, so that a check can return it. */
bool fail(const char *reason);
bool fail_number(const char *before, uint64_t number, const char *after);

/* Learn the asset's size. False: it is missing. */
bool asset_open(asset_reader *reader);

/* The next `size` bytes. False: the asset ends before. */
bool asset_take(asset_reader *reader, void *destination, uint64_t size);

/* The next section, stored for good. NULL: the log says why. */
void *asset_section(asset_reader *reader, uint64_t size);

#endif
