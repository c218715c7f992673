/* The two assets that the host packs for gp_init (guests/llama_assets.py writes them), byte by byte.
 *
 * All numbers are little-endian; nothing is padded but as shown. The reader checks every count against the asset's
 * size and every id against the vocabulary, and says in the log what does not fit.
 *
 * "config": config_asset, 60 bytes.
 *
 * "tokenizer": tokenizer_asset (48 bytes), then its sections without gaps:
 *     u32 token_offsets[num_tokens + 1]   token i's text is token_text[token_offsets[i] .. token_offsets[i + 1])
 *     u32 stop_tokens[num_stop_tokens]
 *     u32 specials[num_specials]          CONTROL, UNKNOWN and USER_DEFINED tokens, sorted by their text
 *     u32 priorities[num_tokens]          only with TOKENIZER_MERGES_BY_SCORE: 0 merges first
 *     merge merges[num_merges]            in rank order
 *     u8  kinds[num_tokens]               token_kind
 *     u8  token_text[token_text_bytes]    for SentencePiece with U+2581 already turned into a space
 */
#ifndef LLAMA_ASSETS_H
#define LLAMA_ASSETS_H

#include <stdbool.h>
#include <stdint.h>

enum { ASSET_VERSION = 1 };

enum config_flag {
    CONFIG_TIE_EMBEDDINGS = 1,
    CONFIG_QKV_BIAS = 2,
    CONFIG_OUTPUT_BIAS = 4,
    CONFIG_MLP_BIAS = 8,
    CONFIG_QK_NORM = 16,
};

typedef struct {
    char magic[4]; /* "GLCF" */
    uint32_t version;
    uint32_t num_layers;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t num_heads;
    uint32_t num_kv_heads;
    uint32_t head_dim;
    uint32_t vocab_size;
    uint32_t context_length; /* tokens */
    uint32_t flags;          /* enum config_flag */
    uint32_t sliding_window; /* tokens; 0: none */
    uint32_t sliding_window_from_layer;
    float rms_norm_eps;
    float rope_scale;
} config_asset;

enum tokenizer_kind { BYTE_LEVEL_BPE = 1, SENTENCEPIECE_BPE = 2 };

enum pre_tokenizer { PRE_NONE = 0, PRE_GPT2 = 1, PRE_SMOLLM = 2, PRE_LLAMA3 = 3, PRE_QWEN2 = 4 };

enum token_kind {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
};

enum tokenizer_flag {
    TOKENIZER_ADD_BOS = 1,
    TOKENIZER_ADD_SPACE_PREFIX = 2, /* before each stretch of ordinary text */
    TOKENIZER_IGNORE_MERGES = 4,
    TOKENIZER_MERGES_BY_SCORE = 8,
    TOKENIZER_SPACE_PREFIX_ONCE = 16,       /* only at the start of a text */
    TOKENIZER_SPACE_PREFIX_IF_MISSING = 32, /* only where no space stands already */
    TOKENIZER_NFC = 64,                     /* byte-level: text is normalised first */
};

#define NO_TOKEN 0xFFFFFFFFu

typedef struct {
    char magic[4]; /* "GLTK" */
    uint32_t version;
    uint32_t kind;          /* enum tokenizer_kind */
    uint32_t pre_tokenizer; /* enum pre_tokenizer */
    uint32_t flags;         /* enum tokenizer_flag */
    uint32_t num_tokens;
    uint32_t num_merges;
    uint32_t num_stop_tokens;
    uint32_t num_specials;
    uint32_t token_text_bytes;
    uint32_t bos_token;     /* or NO_TOKEN */
    uint32_t unknown_token; /* or NO_TOKEN */
} tokenizer_asset;

typedef struct {
    uint32_t left;
    uint32_t right;
    uint32_t merged;
} merge;

_Static_assert(sizeof(config_asset) == 60, "config_asset is 60 bytes");
_Static_assert(sizeof(tokenizer_asset) == 48, "tokenizer_asset is 48 bytes");
_Static_assert(sizeof(merge) == 12, "merge is 12 bytes");

/* The model as read from the assets; constant after init. */
typedef struct {
    tokenizer_asset header;
    const uint32_t *token_offsets;
    const uint32_t *stop_tokens;
    const uint32_t *specials;
    const uint32_t *priorities; /* NULL without TOKENIZER_MERGES_BY_SCORE */
    const uint8_t *kinds;
    const uint8_t *token_text;
} tokenizer_tables;

/* Filled by assets_load, which also builds the lookup tables of vocabulary.h, merges.h and special_tokens.h. */
extern config_asset config;
extern tokenizer_tables tokenizer;

static inline bool tokenizer_has(enum tokenizer_flag flag) {
    return (tokenizer.header.flags & flag) != 0;
}

static inline const uint8_t *token_text(uint32_t token) {
    return tokenizer.token_text + tokenizer.token_offsets[token];
}

static inline uint32_t token_length(uint32_t token) {
    return tokenizer.token_offsets[token + 1] - tokenizer.token_offsets[token];
}

#endif
