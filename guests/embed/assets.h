/* The two assets that the host packs for gp_init (guests/embed_assets.py writes them), byte by byte.
 *
 * All numbers are little-endian; nothing is padded but as shown. The reader checks every count against the asset's
 * size and every id against the vocabulary, and says in the log what does not fit.
 *
 * "config": config_asset, 48 bytes.
 *
 * "tokenizer": tokenizer_asset (44 bytes), then its sections without gaps:
 *     u32 token_offsets[num_tokens + 1]   token i's text is token_text[token_offsets[i] .. token_offsets[i + 1])
 *     u32 specials[num_specials]          tokens that only PARSE_SPECIAL finds, in any order
 *     u8  token_text[token_text_bytes]    pieces that continue a word begin with "##"
 */
#ifndef EMBED_ASSETS_H
#define EMBED_ASSETS_H

#include <stdbool.h>
#include <stdint.h>

enum { ASSET_VERSION = 1 };

enum config_flag {
    CONFIG_NORMALISE = 1, /* vectors have length 1 */
};

typedef struct {
    char magic[4]; /* "GECF" */
    uint32_t version;
    uint32_t num_layers;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t num_heads;
    uint32_t head_dim;
    uint32_t vocab_size;
    uint32_t num_positions;  /* rows of the position table */
    uint32_t context_length; /* tokens, [CLS] and [SEP] included */
    uint32_t flags;          /* enum config_flag */
    float layer_norm_eps;
} config_asset;

enum tokenizer_flag {
    TOKENIZER_CLEAN_TEXT = 1,    /* control characters go, every white space is a space */
    TOKENIZER_SPACE_CJK = 2,     /* CJK ideographs are words of their own */
    TOKENIZER_STRIP_ACCENTS = 4, /* canonical decomposition, then nonspacing marks go */
    TOKENIZER_LOWERCASE = 8,
};

#define NO_TOKEN 0xFFFFFFFFu

enum { WORD_MOST_CHARS = 1024 }; /* highest most_word_chars that is accepted */

typedef struct {
    char magic[4]; /* "GETK" */
    uint32_t version;
    uint32_t flags; /* enum tokenizer_flag */
    uint32_t num_tokens;
    uint32_t num_specials;
    uint32_t token_text_bytes;
    uint32_t first_token;     /* [CLS] */
    uint32_t last_token;      /* [SEP] */
    uint32_t unknown_token;   /* [UNK] */
    uint32_t most_word_chars; /* longer words are unknown */
    uint32_t reserved;        /* 0 */
} tokenizer_asset;

_Static_assert(sizeof(config_asset) == 48, "config_asset is 48 bytes");
_Static_assert(sizeof(tokenizer_asset) == 44, "tokenizer_asset is 44 bytes");

/* The model as read from the assets; constant after init. */
typedef struct {
    tokenizer_asset header;
    const uint32_t *token_offsets;
    const uint32_t *specials;
    const uint8_t *token_text;
} tokenizer_tables;

/* Filled by assets_load, which also builds the lookup table of vocabulary.h. */
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
