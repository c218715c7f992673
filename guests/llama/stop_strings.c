#include "stop_strings.h"

#include "memory.h"
#include "utf8.h"

/* A stop block being read; blocks come from the host unaligned. */
typedef struct {
    const uint8_t *at;
    uint32_t left; /* bytes */
} block_reader;

static bool read_u32(block_reader *reader, uint32_t *number) {
    if (reader->left < sizeof *number)
        return false;
    memcpy(number, reader->at, sizeof *number);
    reader->at += sizeof *number;
    reader->left -= sizeof *number;
    return true;
}

static bool read_text(block_reader *reader, const uint8_t **text, uint32_t *length) {
    if (!read_u32(reader, length) || *length > reader->left)
        return false;
    *text = reader->at;
    reader->at += *length;
    reader->left -= *length;
    return true;
}

uint32_t stop_strings_room(const uint8_t *block, uint32_t length) {
    block_reader reader = {block, length};
    uint32_t count;
    uint32_t num_bytes = 0;
    if (!read_u32(&reader, &count) || count > STOP_MOST_STRINGS)
        return 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *text;
        uint32_t size;
        if (!read_text(&reader, &text, &size) || size > STOP_MOST_BYTES - num_bytes || !utf8_is_valid(text, size))
            return 0;
        num_bytes += size;
    }
    if (reader.left)
        return 0;
    return count * (uint32_t)sizeof(stop_string) + num_bytes * (uint32_t)(sizeof(uint32_t) + 1) + 1;
}

static uint32_t extend(const stop_string *stop, uint32_t matched, uint8_t byte) {
    while (matched > 0 && (matched == stop->length || stop->text[matched] != byte))
        matched = stop->borders[matched - 1];
    return stop->text[matched] == byte ? matched + 1 : 0;
}

static void find_borders(stop_string *stop) {
    stop->borders[0] = 0;
    for (uint32_t i = 1; i < stop->length; i++)
        stop->borders[i] = extend(stop, stop->borders[i - 1], stop->text[i]);
}

/* The next string of a checked block that is not empty; false at the end. */
static bool next_text(block_reader *reader, const uint8_t **text, uint32_t *length) {
    while (read_text(reader, text, length))
        if (*length > 0)
            return true;
    return false;
}

void stop_strings_build(stop_strings *stops, const uint8_t *block, uint32_t length, void *memory) {
    const block_reader strings = {block + sizeof(uint32_t), length - (uint32_t)sizeof(uint32_t)};
    const uint8_t *text;
    uint32_t size;
    *stops = (stop_strings){.strings = memory};
    for (block_reader reader = strings; next_text(&reader, &text, &size); stops->count++) {
        stops->strings[stops->count] = (stop_string){.length = size};
        stops->longest = size > stops->longest ? size : stops->longest;
    }
    uint32_t *borders = (uint32_t *)(stops->strings + stops->count);
    for (uint32_t i = 0; i < stops->count; i++) {
        stops->strings[i].borders = borders;
        borders += stops->strings[i].length;
    }
    uint8_t *copy = (uint8_t *)borders; /* texts behind all borders, which need alignment */
    block_reader reader = strings;
    for (uint32_t i = 0; next_text(&reader, &text, &size); i++) {
        stops->strings[i].text = memcpy(copy, text, size);
        copy += size;
        find_borders(&stops->strings[i]);
    }
}

uint32_t stop_strings_feed(stop_strings *stops, uint8_t byte) {
    uint32_t completed = 0;
    for (uint32_t i = 0; i < stops->count; i++) {
        stop_string *stop = &stops->strings[i];
        stop->num_matched = extend(stop, stop->num_matched, byte);
        if (stop->num_matched == stop->length && stop->length > completed)
            completed = stop->length;
    }
    return completed;
}

uint32_t stop_strings_held(const stop_strings *stops) {
    uint32_t held = 0;
    for (uint32_t i = 0; i < stops->count; i++)
        if (stops->strings[i].num_matched > held)
            held = stops->strings[i].num_matched;
    return held;
}

void stop_strings_reset(stop_strings *stops) {
    for (uint32_t i = 0; i < stops->count; i++)
        stops->strings[i].num_matched = 0;
}
