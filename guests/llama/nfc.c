#include "nfc.h"

#include "memory.h"
#include "nfc_tables.h"
#include "utf8.h"

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

enum {
    FIRST_CHANGED = 0x300, /* texts without this and later characters are in normal form */
    HANGUL_FIRST = 0xAC00,
    HANGUL_L = 0x1100,
    HANGUL_V = 0x1161,
    HANGUL_T = 0x11A7,
    NUM_L = 19,
    NUM_V = 21,
    NUM_T = 28,
};

/* An ill-formed byte among the code points. */
#define RAW_BYTE 0x80000000u

static buffer points;    /* uint32_t: code points of the text, decomposed, then composed in place */
static uint32_t num_points;
static buffer ordered;   /* uint32_t: a run of marks being sorted */
static buffer written;   /* the result */

static uint32_t combining_class(uint32_t point) {
    if (point < FIRST_CHANGED || point > 0x10FFFF)
        return 0;
    uint32_t low = 0, high = COUNT(nfc_classes); /* the last run at or below point is in [low, high) */
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (nfc_classes[middle] >> NFC_CLASS_BITS <= point)
            low = middle;
        else
            high = middle;
    }
    return nfc_classes[low] & ((1u << NFC_CLASS_BITS) - 1);
}

static const nfc_pair *find_decomposition(uint32_t point) {
    uint32_t low = 0, high = COUNT(nfc_pairs);
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (nfc_pairs[middle].code_point == point)
            return &nfc_pairs[middle];
        if (nfc_pairs[middle].code_point < point)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static bool append(uint32_t point) {
    if (!buffer_reserve(&points, (uint64_t)num_points * 4, ((uint64_t)num_points + 1) * 4))
        return false;
    ((uint32_t *)points.data)[num_points++] = point;
    return true;
}

static bool append_decomposed(uint32_t point) {
    uint32_t syllable = point - HANGUL_FIRST;
    if (syllable < NUM_L * NUM_V * NUM_T) {
        uint32_t last = syllable % NUM_T;
        return append(HANGUL_L + syllable / (NUM_V * NUM_T)) && append(HANGUL_V + syllable / NUM_T % NUM_V) &&
               (last == 0 || append(HANGUL_T + last));
    }
    uint32_t seconds[4]; /* only the first part decomposes further, three times at most */
    uint32_t depth = 0;
    const nfc_pair *pair;
    while (depth < COUNT(seconds) && (pair = find_decomposition(point)) != NULL) {
        point = pair->first;
        seconds[depth++] = pair->second;
    }
    if (!append(point))
        return false;
    while (depth > 0)
        if (seconds[--depth] != 0 && !append(seconds[depth]))
            return false;
    return true;
}

/* Sort the marks [begin, end) by class, keeping the order within one: counting, because a hostile text may be one run. */
static bool order_marks(uint32_t begin, uint32_t end) {
    uint32_t *all = points.data;
    uint32_t places[257] = {0};
    bool is_ordered = true;
    for (uint32_t i = begin; i < end; i++) {
        places[combining_class(all[i]) + 1]++;
        is_ordered = is_ordered && (i == begin || combining_class(all[i - 1]) <= combining_class(all[i]));
    }
    if (is_ordered)
        return true;
    if (!buffer_reserve(&ordered, 0, (uint64_t)(end - begin) * 4))
        return false;
    for (uint32_t i = 1; i < COUNT(places); i++)
        places[i] += places[i - 1];
    uint32_t *to = ordered.data;
    for (uint32_t i = begin; i < end; i++)
        to[places[combining_class(all[i])]++] = all[i];
    memcpy(all + begin, to, (size_t)(end - begin) * 4);
    return true;
}

static bool order_all(void) {
    const uint32_t *all = points.data;
    for (uint32_t begin = 0; begin < num_points;) {
        uint32_t end = begin;
        while (end < num_points && combining_class(all[end]) != 0)
            end++;
        if (end - begin > 1 && !order_marks(begin, end))
            return false;
        begin = end + 1;
    }
    return true;
}

/* What the two compose to; 0: nothing. */
static uint32_t compose_pair(uint32_t first, uint32_t second) {
    uint32_t l = first - HANGUL_L, v = second - HANGUL_V;
    if (l < NUM_L && v < NUM_V)
        return HANGUL_FIRST + (l * NUM_V + v) * NUM_T;
    uint32_t syllable = first - HANGUL_FIRST, t = second - HANGUL_T;
    if (syllable < NUM_L * NUM_V * NUM_T && syllable % NUM_T == 0 && t - 1 < NUM_T - 1)
        return first + t;
    uint32_t low = 0, high = COUNT(nfc_compositions);
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        const nfc_pair *pair = &nfc_pairs[nfc_compositions[middle]];
        if (pair->first == first && pair->second == second)
            return pair->code_point;
        if (pair->first < first || (pair->first == first && pair->second < second))
            low = middle + 1;
        else
            high = middle;
    }
    return 0;
}

static void compose_all(void) {
    uint32_t *all = points.data;
    uint32_t size = 0, starter = UINT32_MAX, last_class = 0;
    for (uint32_t i = 0; i < num_points; i++) {
        uint32_t point = all[i], own_class = combining_class(point);
        /* Blocked: something of the same or a higher class stands between the starter and this one. */
        if (starter != UINT32_MAX && (size - 1 == starter || last_class < own_class)) {
            uint32_t composed = compose_pair(all[starter], point);
            if (composed != 0) {
                all[starter] = composed;
                continue;
            }
        }
        if (own_class == 0)
            starter = size;
        last_class = own_class;
        all[size++] = point;
    }
    num_points = size;
}

static uint32_t encode(uint32_t point, uint8_t *to) {
    if (point < 0x80 || (point & RAW_BYTE)) {
        to[0] = (uint8_t)point;
        return 1;
    }
    uint32_t following = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    to[0] = (uint8_t)(0xF0u << (3 - following) | point >> (6 * following));
    for (uint32_t i = 1; i <= following; i++)
        to[i] = 0x80 | (point >> (6 * (following - i)) & 0x3F);
    return following + 1;
}

static bool is_plain(const uint8_t *text, uint32_t length) {
    for (uint32_t i = 0; i < length; i++)
        if (text[i] >= 0xCC) /* the first byte of U+0300 */
            return false;
    return true;
}

bool nfc_normalise(const uint8_t **text, uint32_t *length) {
    if (is_plain(*text, *length))
        return true;
    num_points = 0;
    for (uint32_t i = 0; i < *length;) {
        uint32_t point;
        uint32_t size = utf8_decode(*text + i, *length - i, &point);
        if (!(point == UTF8_INVALID ? append(RAW_BYTE | (*text)[i]) : append_decomposed(point)))
            return false;
        i += size;
    }
    if (!order_all())
        return false;
    compose_all();
    if (!buffer_reserve(&written, 0, (uint64_t)num_points * 4))
        return false;
    uint32_t size = 0;
    for (uint32_t i = 0; i < num_points; i++)
        size += encode(((uint32_t *)points.data)[i], (uint8_t *)written.data + size);
    *text = written.data;
    *length = size;
    return true;
}
