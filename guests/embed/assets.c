#include "assets.h"

#include "asset_reader.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "memory.h"
#include "report.h"
#include "vocabulary.h"

config_asset config;
tokenizer_tables tokenizer;

static bool load_config(void) {
    asset_reader reader = {.name = "config", .name_length = 6};
    if (!asset_open(&reader))
        return false;
    if (reader.size != sizeof config)
        return fail_number("the config asset must have 48 bytes, it has ", reader.size, "");
    if (!asset_take(&reader, &config, sizeof config))
        return false;
    if (memcmp(config.magic, "GECF", sizeof config.magic) != 0 || config.version != ASSET_VERSION)
        return fail_number("the config asset is not of version ", ASSET_VERSION, ": build the snapshot again");
    if (!config.num_layers || !config.hidden_size || !config.intermediate_size || !config.vocab_size)
        return fail("the config asset has a size of zero");
    if ((uint64_t)config.num_heads * config.head_dim != config.hidden_size)
        return fail_number("heads times their width must be the hidden size, which is ", config.hidden_size, "");
    if (config.context_length < 2 || config.context_length > config.num_positions)
        return fail_number("the context must have 2 tokens or more and a position for each; it has ",
                           config.context_length, "");
    return true;
}

static bool check_header(void) {
    const tokenizer_asset *header = &tokenizer.header;
    if (memcmp(header->magic, "GETK", sizeof header->magic) != 0 || header->version != ASSET_VERSION)
        return fail_number("the tokenizer asset is not of version ", ASSET_VERSION, ": build the snapshot again");
    if (!header->num_tokens || header->num_tokens > config.vocab_size)
        return fail_number("the tokenizer needs 1 to vocab_size tokens, it has ", header->num_tokens, "");
    if (!header->most_word_chars || header->most_word_chars > WORD_MOST_CHARS)
        return fail_number("the longest word must have 1 to 1024 characters, not ", header->most_word_chars, "");
    const uint32_t named[] = {header->first_token, header->last_token, header->unknown_token};
    for (uint32_t i = 0; i < sizeof named / sizeof named[0]; i++)
        if (named[i] >= header->num_tokens)
            return fail_number("a special token is outside the vocabulary: ", named[i], "");
    return true;
}

static bool check_tokens(void) {
    const tokenizer_asset *header = &tokenizer.header;
    for (uint32_t i = 0; i < header->num_tokens; i++)
        if (tokenizer.token_offsets[i] > tokenizer.token_offsets[i + 1])
            return fail_number("token offsets run backwards at token ", i, "");
    if (tokenizer.token_offsets[0] != 0 || tokenizer.token_offsets[header->num_tokens] != header->token_text_bytes)
        return fail("token offsets do not cover the token text");
    for (uint32_t i = 0; i < header->num_specials; i++)
        if (tokenizer.specials[i] >= header->num_tokens || token_length(tokenizer.specials[i]) == 0)
            return fail_number("special token ", tokenizer.specials[i], " is outside the vocabulary, or empty");
    return true;
}

static bool load_tokenizer(void) {
    asset_reader reader = {.name = "tokenizer", .name_length = 9};
    tokenizer_asset *header = &tokenizer.header;
    if (!asset_open(&reader) || !asset_take(&reader, header, sizeof *header) || !check_header())
        return false;
    if (!(tokenizer.token_offsets = asset_section(&reader, (header->num_tokens + 1ull) * sizeof(uint32_t))) ||
        !(tokenizer.specials = asset_section(&reader, header->num_specials * (uint64_t)sizeof(uint32_t))) ||
        !(tokenizer.token_text = asset_section(&reader, header->token_text_bytes)))
        return false;
    if (reader.position != reader.size)
        return fail_number("the tokenizer asset has bytes left over: ", reader.size - reader.position, "");
    return check_tokens();
}

bool assets_load(void) {
    if (!load_config() || !load_tokenizer())
        return false;
    if (!vocabulary_index())
        return fail("out of memory: vocabulary table");
    return true;
}
