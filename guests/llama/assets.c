#include "assets.h"

#include "asset_reader.h"
#include "glowplug.h"
#include "lifecycle.h"
#include "memory.h"
#include "merges.h"
#include "report.h"
#include "special_tokens.h"
#include "vocabulary.h"

enum { MERGES_AT_ONCE = 1024 };

config_asset config;
tokenizer_tables tokenizer;

static bool load_config(void) {
    asset_reader reader = {.name = "config", .name_length = 6};
    if (!asset_open(&reader))
        return false;
    if (reader.size != sizeof config)
        return fail_number("the config asset must have 60 bytes, it has ", reader.size, "");
    if (!asset_take(&reader, &config, sizeof config))
        return false;
    if (memcmp(config.magic, "GLCF", sizeof config.magic) != 0 || config.version != ASSET_VERSION)
        return fail_number("the config asset is not of version ", ASSET_VERSION, ": build the snapshot again");
    if (!config.num_layers || !config.num_heads || !config.num_kv_heads || !config.head_dim || !config.vocab_size)
        return fail("the config asset has a size of zero");
    if (config.num_heads % config.num_kv_heads)
        return fail_number("query heads must be a multiple of key/value heads; query heads: ", config.num_heads, "");
    return true;
}

static bool check_header(void) {
    const tokenizer_asset *header = &tokenizer.header;
    if (memcmp(header->magic, "GLTK", sizeof header->magic) != 0 || header->version != ASSET_VERSION)
        return fail_number("the tokenizer asset is not of version ", ASSET_VERSION, ": build the snapshot again");
    if (header->kind != BYTE_LEVEL_BPE && header->kind != SENTENCEPIECE_BPE)
        return fail_number("unknown tokenizer kind ", header->kind, "");
    if (header->pre_tokenizer > PRE_QWEN2)
        return fail_number("unknown pre-tokenizer ", header->pre_tokenizer, "");
    if (!header->num_tokens || header->num_tokens > config.vocab_size)
        return fail_number("the tokenizer needs 1 to vocab_size tokens, it has ", header->num_tokens, "");
    if (header->bos_token != NO_TOKEN && header->bos_token >= header->num_tokens)
        return fail_number("the begin-of-sequence token is outside the vocabulary: ", header->bos_token, "");
    if (header->unknown_token != NO_TOKEN && header->unknown_token >= header->num_tokens)
        return fail_number("the unknown token is outside the vocabulary: ", header->unknown_token, "");
    return true;
}

static bool check_ids(const uint32_t *ids, uint32_t count, const char *what) {
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] >= tokenizer.header.num_tokens)
            return fail_number(what, ids[i], " is outside the vocabulary");
    return true;
}

static bool check_tokens(void) {
    const tokenizer_asset *header = &tokenizer.header;
    for (uint32_t i = 0; i < header->num_tokens; i++) {
        if (tokenizer.token_offsets[i] > tokenizer.token_offsets[i + 1])
            return fail_number("token offsets run backwards at token ", i, "");
        if (tokenizer.kinds[i] < TOKEN_NORMAL || tokenizer.kinds[i] > TOKEN_BYTE)
            return fail_number("unknown kind of token ", i, "");
        if (tokenizer.kinds[i] == TOKEN_BYTE && token_length(i) != 1)
            return fail_number("a byte token must have one byte: token ", i, "");
    }
    if (tokenizer.token_offsets[0] != 0 || tokenizer.token_offsets[header->num_tokens] != header->token_text_bytes)
        return fail("token offsets do not cover the token text");
    return check_ids(tokenizer.stop_tokens, header->num_stop_tokens, "stop token ") &&
           check_ids(tokenizer.specials, header->num_specials, "special token ");
}

/* Merges go straight into their hash table; only a small buffer of them is held. */
static bool load_merges(asset_reader *reader) {
    static merge chunk[MERGES_AT_ONCE];
    uint32_t num_merges = tokenizer.header.num_merges;
    if (num_merges > (reader->size - reader->position) / sizeof(merge))
        return fail_number("the tokenizer asset cannot hold its merges: ", num_merges, "");
    if (!merges_create(num_merges))
        return fail_number("out of memory: merges: ", num_merges, "");
    for (uint32_t rank = 0; rank < num_merges;) {
        uint32_t count = num_merges - rank < MERGES_AT_ONCE ? num_merges - rank : MERGES_AT_ONCE;
        if (!asset_take(reader, chunk, count * sizeof(merge)) ||
            !check_ids(&chunk[0].left, count * 3, "a merge's token "))
            return false;
        for (uint32_t i = 0; i < count; i++)
            merges_insert(&chunk[i], rank++);
    }
    memset(chunk, 0, sizeof chunk); /* a snapshot holds no leftovers */
    return true;
}

static bool load_tokenizer(void) {
    asset_reader reader = {.name = "tokenizer", .name_length = 9};
    tokenizer_asset *header = &tokenizer.header;
    if (!asset_open(&reader) || !asset_take(&reader, header, sizeof *header) || !check_header())
        return false;
    uint64_t num_tokens = header->num_tokens;
    if (!(tokenizer.token_offsets = asset_section(&reader, (num_tokens + 1) * sizeof(uint32_t))) ||
        !(tokenizer.stop_tokens = asset_section(&reader, header->num_stop_tokens * (uint64_t)sizeof(uint32_t))) ||
        !(tokenizer.specials = asset_section(&reader, header->num_specials * (uint64_t)sizeof(uint32_t))))
        return false;
    if (tokenizer_has(TOKENIZER_MERGES_BY_SCORE) &&
        !(tokenizer.priorities = asset_section(&reader, num_tokens * sizeof(uint32_t))))
        return false;
    if (!load_merges(&reader) || !(tokenizer.kinds = asset_section(&reader, num_tokens)) ||
        !(tokenizer.token_text = asset_section(&reader, header->token_text_bytes)))
        return false;
    if (reader.position != reader.size)
        return fail_number("the tokenizer asset has bytes left over: ", reader.size - reader.position, "");
    return check_tokens();
}

bool assets_load(void) {
    if (!load_config() || !load_tokenizer())
        return false;
    if (!special_tokens_index())
        return fail("special tokens are not sorted by their text, or one is empty");
    if (!vocabulary_index())
        return fail("out of memory: vocabulary table");
    return true;
}
