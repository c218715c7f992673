#include "detokenize.h"

#include "assets.h"

static bool is_hidden(uint32_t token) {
    uint8_t kind = tokenizer.kinds[token];
    return kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN || kind == TOKEN_UNUSED;
}

bool detokenize_accepts(uint32_t token) {
    return token < config.vocab_size;
}

uint64_t detokenize_room(uint32_t token) {
    return UTF8_STREAM_ROOM(token < tokenizer.header.num_tokens ? token_length(token) : 0);
}

uint32_t detokenize_token(detokenizer *state, uint32_t token, bool show_special, uint8_t *out) {
    if (token >= tokenizer.header.num_tokens || (is_hidden(token) && !show_special))
        return 0;
    const uint8_t *text = token_text(token);
    uint32_t length = token_length(token);
    if (length > 0 && !state->has_begun) {
        state->has_begun = true;
        if (tokenizer.header.kind == SENTENCEPIECE_BPE && tokenizer_has(TOKENIZER_ADD_SPACE_PREFIX) &&
            text[0] == ' ') {
            text++;
            length--;
        }
    }
    return utf8_stream_feed(&state->characters, text, length, out);
}
