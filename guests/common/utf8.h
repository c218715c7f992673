/* UTF-8: one strict step of decoding, and the streaming repair that output text goes through. */
#ifndef COMMON_UTF8_H
#define COMMON_UTF8_H

#include <stdbool.h>
#include <stdint.h>

#define UTF8_INVALID 0xFFFFFFFFu
#define UTF8_REPLACEMENT_BYTES 3 /* U+FFFD */

/* Decode the character at `text` (at least 1 byte available); its length in bytes. An ill-formed byte counts as one
 * character, UTF8_INVALID. */
uint32_t utf8_decode(const uint8_t *text, uint32_t available, uint32_t *code_point);

bool utf8_is_valid(const uint8_t *text, uint32_t length);

/* Bytes of a character whose end has not arrived yet. All zero: at a character's border. */
typedef struct {
    uint8_t pending[4];
    uint8_t num_pending;
    uint8_t num_missing;
    uint8_t next_lowest; /* allowed range of the next byte */
    uint8_t next_highest;
} utf8_stream;

/* Most bytes that utf8_stream_feed can write for `length` bytes of input. */
#define UTF8_STREAM_ROOM(length) (UTF8_REPLACEMENT_BYTES * ((uint64_t)(length) + 4))

/* Write the characters that `bytes` complete to `out`; the number of bytes written. Each maximal ill-formed part
 * becomes one U+FFFD, as with Python's errors="replace". Source: Unicode 16, section 3.9.6, table 3-7. */
uint32_t utf8_stream_feed(utf8_stream *stream, const uint8_t *bytes, uint32_t length, uint8_t *out);

/* End of the input: an unfinished character becomes U+FFFD. */
uint32_t utf8_stream_finish(utf8_stream *stream, uint8_t *out);

#endif
