/* The CPU form of reference.py: planes to BF16 bit patterns, bit for bit. Blocks [begin, end) of 256 weights each, of which the
   tensor has `count`; each call is one thread's part. Compiled by native.py. */
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, HALF = 128, BITS = 32, SPAN = 256, NESTED = 7 };

/* Sign and the exponent of a code, before escapes are put right. */
static inline uint16_t framed(int nibble, int start) {
    return (uint16_t)((nibble & 8) << 12 | ((start + (nibble & 7)) << 7 & 0x7F80));
}

/* Where a block is written: the last one may not be whole. */
static inline uint16_t *place(uint16_t *out, uint16_t *scratch, int64_t b, int64_t count) {
    return (b + 1) * BLOCK <= count ? out + b * BLOCK : scratch;
}

static inline void finish(uint16_t *out, const uint16_t *o, int64_t b, int64_t count) {
    if ((b + 1) * BLOCK > count) memcpy(out + b * BLOCK, o, sizeof *o * (size_t)(count - b * BLOCK));
}

/* Exponents of the escapes of one block, whose first is `known`; weights keep what is not of `keep`. */
static inline void escaped(uint16_t *o, const uint8_t *code, const uint8_t *known) {
    for (int i = 0; i < HALF; i++)
        if ((code[i] & 7) == NESTED) o[i] = (uint16_t)((o[i] & 0x807F) | *known++ << 7);
    for (int i = 0; i < HALF; i++)
        if ((code[i] >> 4 & 7) == NESTED) o[HALF + i] = (uint16_t)((o[HALF + i] & 0x807F) | *known++ << 7);
}

static inline int64_t rank_of(const uint16_t *before, const int64_t *spans, int64_t b) {
    return spans[b / SPAN] + before[b];
}

void nested_exact(const uint8_t *code, const uint8_t *first, const uint8_t *second, const uint8_t *middle,
                  const uint8_t *last, const uint8_t *escapes, const uint16_t *before, const int64_t *spans, int start,
                  int64_t begin, int64_t end, int64_t count, uint16_t *out) {
    for (int64_t b = begin; b < end; b++) {
        uint16_t scratch[BLOCK], *o = place(out, scratch, b, count);
        const uint8_t *c = code + b * HALF, *m = middle + b * HALF;
        for (int i = 0; i < HALF; i++) {
            o[i] = (uint16_t)(framed(c[i] & 15, start) | (m[i] & 15) << 1);
            o[HALF + i] = (uint16_t)(framed(c[i] >> 4, start) | (m[i] >> 4) << 1);
        }
        const uint8_t *f = first + b * BITS, *s = second + b * BITS, *l = last + b * BITS;
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < BITS; i++)
                o[k * BITS + i] |= (uint16_t)((f[i] >> k & 1) << 6 | (s[i] >> k & 1) << 5 | (l[i] >> k & 1));
        escaped(o, c, escapes + rank_of(before, spans, b));
        finish(out, o, b, count);
    }
}

/* `table` has the mantissa of each prefix, in 1/128; 128 is the next power of two. `kept` bits of mantissa are read. */
void nested_draft(const uint8_t *code, const uint8_t *first, const uint8_t *second, const uint8_t *escapes,
                  const uint16_t *before, const int64_t *spans, const uint16_t *table, int kept, int start,
                  int64_t begin, int64_t end, int64_t count, uint16_t *out) {
    for (int64_t b = begin; b < end; b++) {
        uint16_t scratch[BLOCK], add[BLOCK], *o = place(out, scratch, b, count);
        const uint8_t *c = code + b * HALF;
        for (int i = 0; i < HALF; i++) {
            o[i] = framed(c[i] & 15, start);
            o[HALF + i] = framed(c[i] >> 4, start);
        }
        escaped(o, c, escapes + rank_of(before, spans, b));
        const uint8_t *f = first + b * BITS, *s = second + b * BITS;
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < BITS; i++) {
                int prefix = kept == 0 ? 0 : kept == 1 ? f[i] >> k & 1 : (f[i] >> k & 1) << 1 | (s[i] >> k & 1);
                add[k * BITS + i] = table[prefix];
            }
        for (int i = 0; i < BLOCK; i++) {
            int exponent = o[i] & 0x7F80;
            o[i] = (uint16_t)(o[i] + (exponent == 0 || exponent == 0x7F80 ? 0 : add[i]));
        }
        finish(out, o, b, count);
    }
}

/* Escapes are put right by the caller, who knows their places. */
void fixed12_exact(const uint8_t *code, const uint8_t *rest, int start, int64_t begin, int64_t end, int64_t count,
                   uint16_t *out) {
    for (int64_t b = begin; b < end; b++) {
        uint16_t scratch[BLOCK], *o = place(out, scratch, b, count);
        const uint8_t *c = code + b * HALF, *r = rest + b * BLOCK;
        for (int i = 0; i < HALF; i++) {
            o[i] = (uint16_t)((r[i] & 128) << 8 | ((start + (c[i] & 15)) << 7 & 0x7F80) | (r[i] & 127));
            o[HALF + i] = (uint16_t)((r[HALF + i] & 128) << 8 | ((start + (c[i] >> 4)) << 7 & 0x7F80) | (r[HALF + i] & 127));
        }
        finish(out, o, b, count);
    }
}
