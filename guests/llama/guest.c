/* The llama guest's exports: argument checks and packing only; what they do is in the files they call. */
#include "assets.h"
#include "bpe.h"
#include "detokenize.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "memory.h"
#include "report.h"
#include "sequences.h"
#include "tokenize.h"
#include "vocabulary.h"

GP_EXPORT("gp_tokenize") int64_t gp_tokenize(const uint8_t *text, int32_t length, int32_t flags) {
    static token_list ids;
    if (!guest_is_ready())
        return FAILED;
    if ((uint32_t)length > BPE_LONGEST_WORD_BYTES) {
        report_error("a text may have 67108864 bytes, this one has ", (uint32_t)length, "");
        return FAILED;
    }
    if (!tokenize(text, (uint32_t)length, (uint32_t)flags, &ids)) {
        report_error("out of memory while tokenising; bytes of text: ", (uint32_t)length, "");
        return FAILED;
    }
    return gp_pack(ids.memory.data, ids.count);
}

GP_EXPORT("gp_detokenize") int64_t gp_detokenize(const uint32_t *ids, int32_t count, int32_t flags) {
    static buffer text;
    uint64_t room = UTF8_REPLACEMENT_BYTES;
    for (uint32_t i = 0; i < (uint32_t)count; i++) {
        if (!guest_is_ready() || !detokenize_accepts(ids[i])) {
            report_error("token id outside the vocabulary: ", ids[i], "");
            return FAILED;
        }
        room += detokenize_room(ids[i]);
    }
    if (!buffer_reserve(&text, 0, room)) {
        report_error("out of memory while detokenising; tokens: ", (uint32_t)count, "");
        return FAILED;
    }
    uint8_t *out = text.data;
    uint32_t length = 0;
    detokenizer state = {.has_begun = false};
    for (uint32_t i = 0; i < (uint32_t)count; i++)
        length += detokenize_token(&state, ids[i], (flags & GP_SHOW_SPECIAL) != 0, out + length);
    length += utf8_stream_finish(&state.characters, out + length);
    return gp_pack(out, length);
}

GP_EXPORT("gp_token_bytes") int64_t gp_token_bytes(int32_t token) {
    if (!guest_is_ready() || !detokenize_accepts((uint32_t)token))
        return FAILED;
    if ((uint32_t)token >= tokenizer.header.num_tokens)
        return gp_pack(tokenizer.token_text, 0); /* padding rows of the vocabulary have no text */
    return gp_pack(token_text((uint32_t)token), token_length((uint32_t)token));
}

GP_EXPORT("gp_sequence_open") int32_t gp_sequence_open(const uint8_t *stop, int32_t length, int32_t flags) {
    return guest_is_ready() ? sequence_open(stop, (uint32_t)length, (uint32_t)flags) : FAILED;
}

GP_EXPORT("gp_sequence_push") int64_t gp_sequence_push(int32_t sequence, int32_t token) {
    static gp_push_result result;
    released_text released;
    if (!sequence_push(sequence, (uint32_t)token, &released))
        return FAILED;
    result = (gp_push_result){(uint32_t)(uintptr_t)released.text, released.length, released.finish};
    return gp_pack(&result, sizeof result);
}

GP_EXPORT("gp_sequence_flush") int64_t gp_sequence_flush(int32_t sequence) {
    released_text released;
    return sequence_flush(sequence, &released) ? gp_pack(released.text, released.length) : FAILED;
}

GP_EXPORT("gp_sequence_close") void gp_sequence_close(int32_t sequence) {
    sequence_close(sequence);
}
