#include "utf8.h"

#include "memory.h"

/* What follows a lead byte: how many bytes, and the range of the first of them (the others are 80..BF). */
typedef struct {
    uint8_t num_following;
    uint8_t lowest;
    uint8_t highest;
} lead_rule;

static bool lead_byte(uint8_t byte, lead_rule *rule) {
    *rule = (lead_rule){0, 0x80, 0xBF};
    if (byte < 0x80)
        return true;
    if (byte < 0xC2 || byte > 0xF4)
        return false;
    rule->num_following = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
    if (byte == 0xE0)
        rule->lowest = 0xA0; /* shorter forms exist below */
    else if (byte == 0xED)
        rule->highest = 0x9F; /* surrogates above */
    else if (byte == 0xF0)
        rule->lowest = 0x90;
    else if (byte == 0xF4)
        rule->highest = 0x8F; /* beyond U+10FFFF above */
    return true;
}

uint32_t utf8_decode(const uint8_t *text, uint32_t available, uint32_t *code_point) {
    lead_rule rule;
    *code_point = UTF8_INVALID;
    if (!lead_byte(text[0], &rule) || rule.num_following >= available)
        return 1;
    if (rule.num_following == 0) {
        *code_point = text[0];
        return 1;
    }
    uint32_t value = text[0] & (0x3Fu >> rule.num_following);
    for (uint32_t i = 1; i <= rule.num_following; i++) {
        if (text[i] < rule.lowest || text[i] > rule.highest)
            return 1;
        value = value << 6 | (text[i] & 0x3F);
        rule.lowest = 0x80;
        rule.highest = 0xBF;
    }
    *code_point = value;
    return rule.num_following + 1u;
}

bool utf8_is_valid(const uint8_t *text, uint32_t length) {
    uint32_t position = 0;
    while (position < length) {
        uint32_t code_point;
        position += utf8_decode(text + position, length - position, &code_point);
        if (code_point == UTF8_INVALID)
            return false;
    }
    return true;
}

static uint32_t write_replacement(uint8_t *out) {
    memcpy(out, "\xEF\xBF\xBD", UTF8_REPLACEMENT_BYTES);
    return UTF8_REPLACEMENT_BYTES;
}

static uint32_t feed_first(utf8_stream *stream, uint8_t byte, uint8_t *out) {
    lead_rule rule;
    if (!lead_byte(byte, &rule))
        return write_replacement(out);
    if (rule.num_following == 0) {
        *out = byte;
        return 1;
    }
    *stream = (utf8_stream){{byte}, 1, rule.num_following, rule.lowest, rule.highest};
    return 0;
}

static uint32_t feed_byte(utf8_stream *stream, uint8_t byte, uint8_t *out) {
    if (stream->num_missing == 0)
        return feed_first(stream, byte, out);
    if (byte < stream->next_lowest || byte > stream->next_highest) {
        uint32_t written = utf8_stream_finish(stream, out);
        return written + feed_first(stream, byte, out + written);
    }
    stream->pending[stream->num_pending++] = byte;
    stream->next_lowest = 0x80;
    stream->next_highest = 0xBF;
    if (--stream->num_missing)
        return 0;
    uint32_t written = stream->num_pending;
    memcpy(out, stream->pending, written);
    stream->num_pending = 0;
    return written;
}

uint32_t utf8_stream_feed(utf8_stream *stream, const uint8_t *bytes, uint32_t length, uint8_t *out) {
    uint32_t written = 0;
    for (uint32_t i = 0; i < length; i++)
        written += feed_byte(stream, bytes[i], out + written);
    return written;
}

uint32_t utf8_stream_finish(utf8_stream *stream, uint8_t *out) {
    bool unfinished = stream->num_missing != 0;
    *stream = (utf8_stream){0};
    return unfinished ? write_replacement(out) : 0;
}
