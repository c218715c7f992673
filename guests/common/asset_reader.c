#include "asset_reader.h"

#include "glowplug.h"
#include "memory.h"
#include "report.h"

bool fail(const char *reason) {
    message line = {.length = 0};
    message_log(message_text(&line, reason), GP_LOG_ERROR);
    return false;
}

bool fail_number(const char *before, uint64_t number, const char *after) {
    report_error(before, number, after);
    return false;
}

bool asset_open(asset_reader *reader) {
    int64_t size = gp_asset_size(reader->name, reader->name_length);
    if (size < 0) {
        message line = {.length = 0};
        message_text(message_text(message_text(&line, "asset \""), reader->name), "\" is missing");
        message_log(&line, GP_LOG_ERROR);
        return false;
    }
    reader->size = (uint64_t)size;
    return true;
}

bool asset_take(asset_reader *reader, void *destination, uint64_t size) {
    if (size > reader->size - reader->position)
        return fail_number("an asset ends early: its counts ask for more than its ", reader->size, " bytes");
    int32_t got = gp_asset_read(reader->name, reader->name_length, (int64_t)reader->position, destination,
                                (uint32_t)size);
    if (got < 0 || (uint32_t)got != size)
        return fail("the host could not read an asset");
    reader->position += size;
    return true;
}

void *asset_section(asset_reader *reader, uint64_t size) {
    if (size > reader->size - reader->position) {
        report_error("the tokenizer asset's counts ask for more than its ", reader->size, " bytes");
        return NULL;
    }
    void *section = memory_store(size);
    if (!section)
        report_error("out of memory: a tokenizer table needs ", size, " bytes");
    else if (!asset_take(reader, section, size))
        return NULL;
    return section;
}
