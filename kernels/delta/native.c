/* The CPU form of reference.py: planes to BF16 bit patterns, bit for bit; blocks of 256 weights, of which the tensor has
   `count`. Compiled by native.py, with OpenMP where it can be had: then `threads` share the blocks, and they are the ones that
   torch multiplies with. (Threads of our own would have to wait for those, which go on spinning after each product.) Each
   function returns 1 where the planes cannot be those of an encoder, and 0 otherwise. */
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, HALF = 128, BITS = 32, SPAN = 256 };
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bytes are looked at in words whose first byte is the lowest"
#endif

/* Sign and the exponent of a code, before escapes are put right. */
static inline uint16_t framed(int nibble, int start) {
    return (uint16_t)((nibble & 8) << 12 | ((start + (nibble & 7)) << 7 & 0x7F80));
}

/* A loop over blocks, in as many threads as it pays for. */
#ifdef _OPENMP
#define DO(text) _Pragma(#text)
#define BLOCKS(threads) DO(omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(| : bad))
#else
#define BLOCKS(threads)
#endif

/* Where a block is written: the last one may not be whole. */
static inline uint16_t *place(uint16_t *out, uint16_t *scratch, int64_t b, int64_t count) {
    return (b + 1) * BLOCK <= count ? out + b * BLOCK : scratch;
}

static inline void finish(uint16_t *out, const uint16_t *o, int64_t b, int64_t count) {
    if ((b + 1) * BLOCK > count) memcpy(out + b * BLOCK, o, sizeof *o * (size_t)(count - b * BLOCK));
}

/* Exponents of the escapes of one block, whose first is number `rank`. They are few, so eight codes are looked at together: a
   code of 7 plus 1 has bit 3. Returns 1 if there are more than `room`, of all. */
static inline int escaped(uint16_t *o, const uint8_t *code, const uint8_t *escapes, int64_t rank, int64_t room) {
    if (rank < 0 || rank > room) return 1;
    const uint8_t *known = escapes + rank, *behind = escapes + room;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < HALF; i += 8) {
            uint64_t codes, hits;
            memcpy(&codes, code + i, sizeof codes);
            hits = ((codes >> 4 * half & 0x0707070707070707u) + 0x0101010101010101u) & 0x0808080808080808u;
            for (; hits; hits &= hits - 1) {
                if (known >= behind) return 1;
                int at = half * HALF + i + (__builtin_ctzll(hits) >> 3);
                o[at] = (uint16_t)((o[at] & 0x807F) | *known++ << 7);
            }
        }
    return 0;
}

static inline int64_t rank_of(const uint16_t *before, const int64_t *spans, int64_t b) {
    return spans[b / SPAN] + before[b];
}

int nested_exact(const uint8_t *code, const uint8_t *first, const uint8_t *second, const uint8_t *middle,
                 const uint8_t *last, const uint8_t *escapes, const uint16_t *before, const int64_t *spans, int64_t room,
                 int start, int threads, int64_t blocks, int64_t count, uint16_t *out) {
    int bad = 0;
    BLOCKS(threads)
    for (int64_t b = 0; b < blocks; b++) {
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
        bad |= escaped(o, c, escapes, rank_of(before, spans, b), room);
        finish(out, o, b, count);
    }
    return bad;
}

/* `table` has the mantissa of each prefix, in 1/128; 128 is the next power of two. `kept` bits of mantissa are read. The table
   is looked up by what each bit changes in it, which is the same few steps for all weights at a time. */
int nested_draft(const uint8_t *code, const uint8_t *first, const uint8_t *second, const uint8_t *escapes,
                 const uint16_t *before, const int64_t *spans, const uint16_t *table, int64_t room, int kept, int start,
                 int threads, int64_t blocks, int64_t count, uint16_t *out) {
    int bad = 0;
    uint16_t none = table[0], high = 0, low = 0, both = 0;
    if (kept == 1) high = none ^ table[1];
    if (kept == 2) high = none ^ table[2], low = none ^ table[1], both = none ^ table[1] ^ table[2] ^ table[3];
    BLOCKS(threads)
    for (int64_t b = 0; b < blocks; b++) {
        uint16_t scratch[BLOCK], add[BLOCK], *o = place(out, scratch, b, count);
        const uint8_t *c = code + b * HALF;
        for (int i = 0; i < HALF; i++) {
            o[i] = framed(c[i] & 15, start);
            o[HALF + i] = framed(c[i] >> 4, start);
        }
        bad |= escaped(o, c, escapes, rank_of(before, spans, b), room);
        const uint8_t *f = first + b * BITS, *s = second + b * BITS;
        for (int i = 0; i < BLOCK; i++) add[i] = none;
        for (int k = 0; k < 8 && kept > 0; k++)
            for (int i = 0; i < BITS; i++) add[k * BITS + i] ^= (uint16_t)(-(f[i] >> k & 1) & high);
        for (int k = 0; k < 8 && kept > 1; k++)
            for (int i = 0; i < BITS; i++)
                add[k * BITS + i] ^= (uint16_t)((-(s[i] >> k & 1) & low) ^ (-((f[i] & s[i]) >> k & 1) & both));
        for (int i = 0; i < BLOCK; i++) {
            int exponent = o[i] & 0x7F80;
            o[i] = (uint16_t)(o[i] + (exponent == 0 || exponent == 0x7F80 ? 0 : add[i]));
        }
        finish(out, o, b, count);
    }
    return bad;
}

/* Escapes are put right by the caller, who knows their places. */
int fixed12_exact(const uint8_t *code, const uint8_t *rest, int start, int threads, int64_t blocks, int64_t count,
                  uint16_t *out) {
    int bad = 0;
    BLOCKS(threads)
    for (int64_t b = 0; b < blocks; b++) {
        uint16_t scratch[BLOCK], *o = place(out, scratch, b, count);
        const uint8_t *c = code + b * HALF, *r = rest + b * BLOCK;
        for (int i = 0; i < HALF; i++) {
            o[i] = (uint16_t)((r[i] & 128) << 8 | ((start + (c[i] & 15)) << 7 & 0x7F80) | (r[i] & 127));
            o[HALF + i] = (uint16_t)((r[HALF + i] & 128) << 8 | ((start + (c[i] >> 4)) << 7 & 0x7F80) | (r[HALF + i] & 127));
        }
        finish(out, o, b, count);
    }
    return bad;
}

/* A scale of bfloat16, or of half precision; it is finite. */
static float scale_of(uint16_t scale, int half) {
    uint32_t wide = (uint32_t)scale << 16, exponent = scale >> 10 & 31, mantissa = scale & 1023;
    float s;
    if (half) {
        if (exponent == 0) return (float)mantissa * (scale & 0x8000 ? -0x1p-24f : 0x1p-24f);
        wide = (wide & 0x80000000u) | (exponent + 112) << 23 | mantissa << 13;
    }
    memcpy(&s, &wide, sizeof s);
    return s;
}

/* The pattern of q * scale in bfloat16, rounded to even. A table of the 16 would be looked up weight by weight; this is done for
   many at a time. */
static inline uint16_t value(int code, float s) {
    float product = (float)(code - 8) * s;
    uint32_t u;
    memcpy(&u, &product, sizeof u);
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

/* Its number in the order of the values, so that neighbours differ by 1. */
static inline uint16_t ordinal(uint16_t u) { return (uint16_t)(u < 0x8000 ? u : 0x7FFF - u); }

/* `group` weights have a scale, a multiple of BITS: so many are done at a time. Patches are put in by the caller, who knows
   their places. */
int int4_delta_exact(const uint8_t *code, const uint16_t *scales, const uint8_t *low, const uint8_t *escapes,
                     const uint16_t *before, const int64_t *spans, int64_t room, int group, int half, int threads,
                     int64_t blocks, int64_t count, uint16_t *out) {
    int bad = 0;
    BLOCKS(threads)
    for (int64_t b = 0; b < blocks; b++) {
        uint16_t scratch[BLOCK], *o = place(out, scratch, b, count);
        uint8_t q[BLOCK], none[BLOCK];
        const uint8_t *c = code + b * HALF, *l = low + b * BLOCK;
        int64_t rank = rank_of(before, spans, b);
        int count_none = 0;
        for (int i = 0; i < HALF; i++) q[i] = c[i] & 15;
        for (int i = 0; i < HALF; i++) q[HALF + i] = c[i] >> 4;
        for (int g = 0; g < BLOCK / group; g++) {
            float s = scale_of(scales[b * (BLOCK / group) + g], half);
            for (int i = g * group; i < (g + 1) * group; i += BITS)
                for (int j = i; j < i + BITS; j++) o[j] = (uint16_t)(ordinal(value(q[j], s)) + (int8_t)l[j]);
        }
        for (int i = 0; i < BLOCK; i++) { /* without a branch that nobody could foresee */
            none[count_none] = (uint8_t)i;
            count_none += q[i] == 8;
        }
        if (rank < 0 || rank + count_none > room) {
            bad = 1;
            continue;
        }
        for (int k = 0; k < count_none; k++) o[none[k]] = (uint16_t)(escapes[rank + k] << 8 | l[none[k]]);
        for (int i = 0; i < BLOCK; i++) o[i] = (uint16_t)((int16_t)o[i] >= 0 ? o[i] : 0x7FFF - o[i]);
        finish(out, o, b, count);
    }
    return bad;
}

int int4_draft(const uint8_t *code, const uint16_t *scales, int group, int half, int threads, int64_t blocks,
               int64_t count, uint16_t *out) {
    int bad = 0;
    BLOCKS(threads)
    for (int64_t b = 0; b < blocks; b++) {
        uint16_t scratch[BLOCK], *o = place(out, scratch, b, count);
        uint8_t q[BLOCK];
        const uint8_t *c = code + b * HALF;
        for (int i = 0; i < HALF; i++) q[i] = c[i] & 15, q[HALF + i] = c[i] >> 4;
        for (int g = 0; g < BLOCK / group; g++) {
            float s = scale_of(scales[b * (BLOCK / group) + g], half);
            for (int i = g * group; i < (g + 1) * group; i += BITS)
                for (int j = i; j < i + BITS; j++) o[j] = value(q[j], s);
        }
        finish(out, o, b, count);
    }
    return bad;
}
