/* Splitting of text into words before byte-level BPE: the regular expressions of the models, as code.
 *
 * Source: the pre_tokenizer sections of the models' tokenizer.json files.
 *   GPT2    '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   SMOLLM  every number on its own first, then GPT2 on what lies between
 *   LLAMA3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *   QWEN2   LLAMA3 with \p{N} in place of \p{N}{1,3}
 */
#ifndef LLAMA_PRETOKENIZE_H
#define LLAMA_PRETOKENIZE_H

#include <stdint.h>

#include "assets.h"

/* End of the word that starts at `start` (< length); always beyond it. The words of a text cover it without gaps.
 * Ill-formed bytes count as characters that are neither letter, number nor space. */
uint32_t pretokenize_word(enum pre_tokenizer rule, const uint8_t *text, uint32_t start, uint32_t length);

#endif
