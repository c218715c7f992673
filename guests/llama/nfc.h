/* Unicode normalisation form C of a text. Source: Unicode 16, section 3.11; UAX #15. */
#ifndef LLAMA_NFC_H
#define LLAMA_NFC_H

#include <stdbool.h>
#include <stdint.h>

/* Point `text` and `length` at their normal form: themselves, or memory that lasts until the next call. Ill-formed
 * bytes stay as they are. O(n log n). False: out of memory. */
bool nfc_normalise(const uint8_t **text, uint32_t *length);

#endif
