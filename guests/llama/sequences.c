#include "sequences.h"

#include "assets.h"
#include "detokenize.h"
#include "glowplug.h"
#include "memory.h"
#include "report.h"
#include "stop_strings.h"

enum { FIRST_ENTRIES = 64, INDEX_BITS = 16, GENERATION_MASK = 0x7FFF };

/* One block of memory: this struct, the stop strings, the held text. */
typedef struct {
    detokenizer text;
    stop_strings stops;
    uint8_t *held; /* the end of the output while it may begin a stop string: less than the longest of them */
    uint32_t num_held;
    uint32_t flags;
    uint32_t finish;
} sequence;

/* A handle is generation << INDEX_BITS | index of the entry, so that one of a closed sequence is not mistaken. */
typedef struct {
    sequence *sequence; /* NULL: free */
    uint32_t generation;
    uint32_t next_free;
} entry;

static buffer table; /* of entry */
static uint32_t num_entries;
static uint32_t first_free; /* == num_entries: none */
static buffer output;

static entry *entry_at(uint32_t index) {
    return (entry *)table.data + index;
}

static entry *find(int32_t handle) {
    uint32_t index = (uint32_t)handle & (SEQUENCES_MOST_OPEN - 1);
    if (handle < 0 || index >= num_entries)
        return NULL;
    entry *found = entry_at(index);
    return found->sequence && found->generation == (uint32_t)handle >> INDEX_BITS ? found : NULL;
}

static int32_t refuse(const char *reason) {
    message line = {.length = 0};
    message_log(message_text(&line, reason), GP_LOG_ERROR);
    return -1;
}

static bool grow_table(void) {
    uint32_t wanted = num_entries ? 2 * num_entries : FIRST_ENTRIES;
    if (!buffer_reserve(&table, num_entries * (uint64_t)sizeof(entry), wanted * (uint64_t)sizeof(entry)))
        return false;
    for (uint32_t i = num_entries; i < wanted; i++)
        *entry_at(i) = (entry){.next_free = i + 1};
    num_entries = wanted;
    return true;
}

static sequence *create(const uint8_t *stop_block, uint32_t length, uint32_t flags) {
    uint32_t stop_room = length ? stop_strings_room(stop_block, length) : 0;
    sequence *created = memory_take(sizeof(sequence) + (uint64_t)stop_room + length); /* held text is shorter than the block */
    if (!created)
        return NULL;
    memset(created, 0, sizeof *created);
    created->flags = flags;
    created->text.has_begun = (flags & GP_KEEP_LEADING_SPACE) != 0;
    if (stop_room)
        stop_strings_build(&created->stops, stop_block, length, created + 1);
    created->held = (uint8_t *)(created + 1) + stop_room;
    return created;
}

int32_t sequence_open(const uint8_t *stop_block, uint32_t length, uint32_t flags) {
    if (length && !stop_strings_room(stop_block, length))
        return refuse("stop strings are malformed, not UTF-8, or more than 256 strings or 65536 bytes");
    if (first_free == num_entries && num_entries == SEQUENCES_MOST_OPEN)
        return refuse("65536 sequences are open: close some first");
    if (first_free == num_entries && !grow_table())
        return refuse("out of memory: table of sequences");
    sequence *created = create(stop_block, length, flags);
    if (!created)
        return refuse("out of memory: sequence");
    uint32_t index = first_free;
    entry *entry = entry_at(index);
    first_free = entry->next_free;
    entry->sequence = created;
    return (int32_t)(entry->generation << INDEX_BITS | index);
}

void sequence_close(int32_t handle) {
    entry *entry = find(handle);
    if (!entry)
        return;
    memory_give(entry->sequence);
    entry->sequence = NULL;
    entry->generation = (entry->generation + 1) & GENERATION_MASK;
    entry->next_free = first_free;
    first_free = (uint32_t)handle & (SEQUENCES_MOST_OPEN - 1);
}

static bool is_stop_token(uint32_t token) {
    for (uint32_t i = 0; i < tokenizer.header.num_stop_tokens; i++)
        if (tokenizer.stop_tokens[i] == token)
            return true;
    return false;
}

/* Output begins with the held text; room for `room` bytes behind it. NULL: out of memory. */
static uint8_t *begin_output(const sequence *sequence, uint64_t room) {
    if (!buffer_reserve(&output, 0, sequence->num_held + room))
        return NULL;
    memcpy(output.data, sequence->held, sequence->num_held);
    return output.data;
}

/* Put the `num_new` bytes behind the held text through the stop strings; the bytes that may be released. */
static uint32_t apply_stops(sequence *sequence, const uint8_t *text, uint32_t num_new) {
    uint32_t end = sequence->num_held + num_new;
    for (uint32_t i = sequence->num_held; i < end; i++) {
        uint32_t completed = stop_strings_feed(&sequence->stops, text[i]);
        if (completed) {
            sequence->finish = GP_FINISH_STOP_STRING;
            sequence->num_held = 0;
            return i + 1 - completed;
        }
    }
    sequence->num_held = stop_strings_held(&sequence->stops);
    memcpy(sequence->held, text + end - sequence->num_held, sequence->num_held);
    return end - sequence->num_held;
}

/* Everything that is left, through the stop strings once more because of the U+FFFD at the end. */
static bool release_rest(sequence *sequence, released_text *released) {
    uint8_t *text = begin_output(sequence, UTF8_REPLACEMENT_BYTES);
    if (!text)
        return false;
    uint32_t num_new = utf8_stream_finish(&sequence->text.characters, text + sequence->num_held);
    released->text = text;
    released->length = apply_stops(sequence, text, num_new) + sequence->num_held;
    sequence->num_held = 0;
    stop_strings_reset(&sequence->stops);
    return true;
}

bool sequence_push(int32_t handle, uint32_t token, released_text *released) {
    entry *entry = find(handle);
    *released = (released_text){.text = output.data};
    if (!entry || !detokenize_accepts(token))
        return false;
    sequence *sequence = entry->sequence;
    released->finish = sequence->finish;
    if (sequence->finish != GP_FINISH_NONE)
        return true;
    if (is_stop_token(token) && !(sequence->flags & GP_IGNORE_STOP_TOKENS)) {
        if (!release_rest(sequence, released))
            return false;
        if (sequence->finish == GP_FINISH_NONE)
            sequence->finish = GP_FINISH_STOP_TOKEN;
        released->finish = sequence->finish;
        return true;
    }
    uint8_t *text = begin_output(sequence, detokenize_room(token));
    if (!text)
        return false;
    bool show_special = (sequence->flags & GP_SHOW_SPECIAL) != 0;
    uint32_t num_new = detokenize_token(&sequence->text, token, show_special, text + sequence->num_held);
    uint32_t length = apply_stops(sequence, text, num_new);
    *released = (released_text){text, length, sequence->finish};
    return true;
}

bool sequence_flush(int32_t handle, released_text *released) {
    entry *entry = find(handle);
    *released = (released_text){.text = output.data};
    if (!entry)
        return false;
    if (entry->sequence->finish == GP_FINISH_NONE && !release_rest(entry->sequence, released))
        return false;
    released->finish = entry->sequence->finish;
    return true;
}
