/* See edge_decode.h for how to use it, FORMAT.md for what the bytes mean. */
#include "edge_decode.h"
#include <string.h>

#define MAX_BYTES 0x7FFFFFFFu /* of a tensor */
#define MAX_ALPHABET 8192u
#define LOW 0x10000u /* a state below it takes in two bytes */

static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* Bytes, read with suspicion: once something was wrong, all reads give 0 or NULL and go no further, also of parts. */
typedef struct { const uint8_t *at, *end; int *damaged; } Cursor;

static size_t left(const Cursor *in) { return (size_t)(in->end - in->at); }

static inline int require(const Cursor *in, int holds) {
    if (!holds) *in->damaged = 1;
    return !*in->damaged;
}
static const uint8_t *take(Cursor *in, uint64_t size) {
    if (!require(in, size <= left(in))) return NULL;
    in->at += size;
    return in->at - size;
}
static Cursor part(Cursor *in, uint64_t size) {
    const uint8_t *start = take(in, size);
    return (Cursor){start == NULL ? in->at : start, in->at, in->damaged};
}
static uint64_t number(Cursor *in, uint32_t size) {
    const uint8_t *at = take(in, size);
    uint64_t value = 0;
    while (at != NULL && size-- > 0) value = value << 8 | at[size];
    return value;
}
static uint32_t varint(Cursor *in, uint32_t limit) {
    uint64_t value = 0, digit = 0x80;
    for (uint32_t shift = 0; shift < 35 && digit >= 0x80; shift += 7)
        digit = number(in, 1), value |= (digit & 0x7F) << shift;
    return require(in, digit < 0x80 && value <= limit) ? (uint32_t)value : 0;
}

/* Bits, most significant first; beyond the end there are zeros. */
typedef struct { Cursor in; uint64_t position, window; uint32_t held; } Bits;

static inline uint32_t peek(Bits *from, uint32_t width) {
    if (from->held < width) {
        const uint64_t first = from->position >> 3, size = left(&from->in), there = first < size ? size - first : 0;
        const uint8_t *at = from->in.end - there;
        for (uint32_t i = 0; there >= 8 && i < 8; ++i) from->window = from->window << 8 | at[i]; /* seen as one load */
        for (uint32_t i = 0; there < 8 && i < 8; ++i) from->window = from->window << 8 | (i < there ? at[i] : 0);
        from->window <<= from->position & 7, from->held = 57;
    }
    return (uint32_t)(from->window >> 1 >> (63 - width));
}
static inline uint32_t bits(Bits *from, uint32_t width) {
    const uint32_t value = peek(from, width);
    from->window <<= width, from->held -= width, from->position += width;
    return value;
}
static uint32_t exp_golomb(Bits *from, uint32_t order, uint32_t limit) {
    uint32_t zeros = 0;
    while (zeros < 16 && bits(from, 1) == 0) ++zeros; /* limits are at most 2**14: 16 zeros are too many */
    const uint32_t value = (1u << (zeros + order) | bits(from, zeros + order)) - (1u << order);
    return require(&from->in, zeros < 16 && value <= limit) ? value : 0;
}

static void copy(uint8_t *to, const uint8_t *from, uint32_t size) {
    if (size == 4) memcpy(to, from, 4); /* of a size that is known: one instruction */
    else if (size == 1) *to = *from;
    else memcpy(to, from, size);
}
static void store(uint8_t *at, uint64_t value, uint32_t size) {
    for (; size > 0; --size, value >>= 8) *at++ = (uint8_t)value;
}

/* The caller's workspace, handed out in pieces of zeros; without one, only how much it must have is found. */
typedef struct { uint8_t *base; uint64_t used, *peak; } Arena;

static void *reserve(Arena *memory, uint64_t size) {
    const uint64_t start = memory->used;
    memory->used += (size + 7) & ~(uint64_t)7;
    if (memory->used > *memory->peak) *memory->peak = memory->used;
    return memory->base == NULL ? NULL : memset(memory->base + start, 0, (size_t)size);
}

/* What the next bits, or the lower bits of a state, stand for; size: length of the code, or frequency. */
typedef struct { uint16_t symbol, size, offset; } Entry;

/* A stream of symbols. */
typedef struct {
    Bits bits;    /* what follows */
    Cursor sizes; /* of the Huffman chunks that follow */
    uint32_t coder, alphabet, left, width, used, chunk, chunk_left, lanes, lane, *states;
    uint64_t chunk_end;
    Entry *table; /* looked up by `width` bits; its first entries are used */
} Stream;
enum { CONSTANT, HUFFMAN, RANS, PLAIN };

/* Gives the next entries to a symbol; more than there are (against Kraft's inequality) are damage. */
static void fill(Stream *s, const Cursor *in, uint32_t count, uint32_t symbol, uint32_t size) {
    for (uint32_t i = 0; i < count && require(in, s->used < 1u << s->width); ++i, ++s->used)
        if (s->table != NULL) s->table[s->used] = (Entry){(uint16_t)symbol, (uint16_t)size, (uint16_t)i};
}

static uint32_t nibble(const uint8_t *at, uint32_t i) { return at[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15u; }

static void open_huffman(Stream *s, Cursor *in, Arena *memory) {
    const uint8_t *lengths = take(in, (s->alphabet + 1) / 2);
    for (uint32_t symbol = 0; lengths != NULL && symbol < s->alphabet; ++symbol)
        if (nibble(lengths, symbol) > s->width) s->width = nibble(lengths, symbol);
    const uint32_t chunks = varint(in, s->left);
    if (!require(in, s->width > 0 && chunks > 0)) return;
    s->chunk = s->chunk_left = (s->left + chunks - 1) / chunks;
    require(in, s->chunk <= 1u << 15 && (uint64_t)s->chunk * (chunks - 1) < s->left);
    s->sizes = *in;
    for (uint32_t chunk = 1; chunk < chunks && !*in->damaged; ++chunk) varint(in, 15 * s->chunk);
    s->table = reserve(memory, sizeof(Entry) << s->width);
    for (uint32_t length = 1; length <= s->width; ++length)
        for (uint32_t symbol = 0; symbol < s->alphabet; ++symbol) /* in this order the codes leave no gaps */
            if (nibble(lengths, symbol) == length) fill(s, in, 1u << (s->width - length), symbol, length);
    fill(s, in, (1u << s->width) - s->used, MAX_ALPHABET, 1); /* no code begins so */
}

static void open_rans(Stream *s, Cursor *in, Arena *memory) {
    const uint32_t width = s->width = number(in, 1), order = number(in, 1);
    if (!require(in, width >= 6 && width <= 14 && width % 2 == 0 && order <= 12)) return;
    Bits from = {.in = *in};
    s->table = reserve(memory, sizeof(Entry) << width);
    for (uint32_t symbol = 0; symbol < s->alphabet; ++symbol) {
        const uint32_t rest = (1u << width) - s->used;
        const uint32_t frequency = symbol + 1 < s->alphabet ? exp_golomb(&from, order, rest) : rest;
        fill(s, in, frequency, symbol, frequency);
    }
    take(in, (from.position + 7) / 8);
    s->lanes = varint(in, least(8192, s->left));
    require(in, s->lanes > 0 && (s->lanes == 8192 || (uint64_t)s->lanes << 14 >= s->left));
    s->states = reserve(memory, 4 * (uint64_t)s->lanes);
    Cursor states = part(in, 4 * (uint64_t)s->lanes);
    for (uint32_t i = 0; s->states != NULL && i < s->lanes; ++i) s->states[i] = number(&states, 4);
}

/* Prepares to decode `count` symbols from all of `in`. */
static Stream open_stream(Cursor in, uint32_t count, uint32_t alphabet, Arena *memory) {
    Stream s = {.coder = number(&in, 1), .alphabet = alphabet, .left = count, .chunk_left = count};
    require(&in, s.coder <= PLAIN && (s.coder == CONSTANT || (count > 0 && alphabet > 1)));
    if (s.coder == HUFFMAN || s.coder == RANS) {
        (s.coder == HUFFMAN ? open_huffman : open_rans)(&s, &in, memory);
    } else { /* codes of no bits, and of eight */
        const uint32_t first = s.coder == PLAIN ? 0 : number(&in, alphabet > 256 ? 2 : 1);
        require(&in, first < alphabet);
        s.width = s.coder == PLAIN ? 8 : 0;
        s.table = reserve(memory, sizeof(Entry) << s.width);
        for (uint32_t i = 0; i < 1u << s.width; ++i) fill(&s, &in, 1, first + i, s.width);
    }
    s.bits.in = in;
    return s;
}

/* A state that has become low takes in two bytes; without a branch, which nobody could predict. */
static inline uint32_t filled(Cursor *in, uint32_t state) {
    const uint32_t low = state < LOW, there = left(in) >= 2, word = there ? in->at[0] | (uint32_t)in->at[1] << 8 : 0;
    if (low > there) return (uint32_t)require(in, 0);
    in->at += 2 * low;
    return state << 16 * low | (word & (0u - low));
}

static inline uint32_t next_symbol(Stream *s) {
    --s->left;
    if (s->coder == RANS) {
        const uint32_t state = s->states[s->lane];
        const Entry entry = s->table[state & ((1u << s->width) - 1)];
        s->states[s->lane] = filled(&s->bits.in, entry.size * (state >> s->width) + entry.offset);
        s->lane = s->lane + 1 < s->lanes ? s->lane + 1 : 0;
        return entry.symbol;
    }
    if (s->chunk_left-- == 0) {
        s->chunk_end += varint(&s->sizes, 15 * s->chunk);
        require(&s->sizes, s->bits.position == s->chunk_end);
        s->chunk_left = s->chunk - 1;
    }
    const Entry code = s->table[peek(&s->bits, s->width)];
    bits(&s->bits, code.size);
    return require(&s->bits.in, code.symbol < s->alphabet) ? code.symbol : 0;
}

/* A stream must end where its bytes end, and its states where the encoder began. */
static void close_stream(const Stream *s) {
    require(&s->bits.in, 8 * (uint64_t)left(&s->bits.in) - s->bits.position < (s->coder == RANS ? 1 : 8));
    for (uint32_t lane = 0; lane < s->lanes; ++lane) require(&s->bits.in, s->states[lane] == LOW);
}

/* Writes what each symbol stands for, `size` bytes, `stride` bytes apart; only over ones where they are `marked`. */
static void expand(Stream s, const uint8_t *values, uint32_t size, uint8_t *to, size_t stride, int marked) {
    for (size_t at = 0; to != NULL && s.left > 0 && !*s.bits.in.damaged; at += stride) {
        if (marked && to[at] == 0) continue;
        const uint32_t symbol = next_symbol(&s);
        if (values == NULL) to[at] = (uint8_t)symbol;
        else copy(to + at, values + (size_t)symbol * size, size);
    }
    if (s.left == 0) close_stream(&s); /* not where memory is measured */
}

/* The bits of a float32 with this value, below 2**24. */
static uint32_t float_bits(uint32_t value) {
    const float number = (float)value;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static void expand_halves(Cursor *in, uint32_t count, uint8_t *to) {
    for (uint32_t i = 0; i < count && !*in->damaged; ++i) {
        const uint32_t half = number(in, 2), magnitude = half & 0x7FFF;
        uint32_t wide = (magnitude << 13) + (112u << 23);
        if (magnitude < 0x400) wide = magnitude == 0 ? 0 : float_bits(magnitude) - (24u << 23); /* x 2**-24 */
        if (magnitude == 0x7C00) wide = 255u << 23; /* infinite */
        require(in, magnitude <= 0x7C00); /* a NaN would not keep its bits: none is stored so */
        if (to != NULL) store(to + 4 * (size_t)i, (half >> 15) << 31 | wide, 4);
    }
}

/* How many values a codebook has, and how they are stored; a bfloat16 is consecutive as the number of its bits. */
typedef struct { uint32_t size, form; } Codebook;
enum { AS_THEY_ARE, AS_HALF, CONSECUTIVE };

static Codebook codebook_head(Cursor *in, const EdgeTensor *tensor, uint32_t limit) {
    static const uint32_t TYPES[3] = {0x1FFFF, 1u << EDGE_FLOAT32, 0x130FC}; /* of each form: bits of its types */
    const uint32_t size = varint(in, limit), form = number(in, 1);
    require(in, size > 0 && form < 3 && TYPES[form] >> tensor->dtype & 1);
    return (Codebook){size, form};
}
static const uint8_t *codebook_values(Cursor *in, const EdgeTensor *tensor, Codebook book, Arena *memory) {
    const uint32_t size = tensor->element_size;
    if (book.form == AS_THEY_ARE) return take(in, (uint64_t)book.size * size);
    uint8_t *values = reserve(memory, (uint64_t)book.size * size);
    if (book.form == AS_HALF) return expand_halves(in, book.size, values), values;
    const uint64_t first = number(in, size);
    for (uint32_t i = 0; values != NULL && i < book.size; ++i) store(values + (size_t)i * size, first + i, size);
    return values;
}

/* Constant, raw and half: no codebook, no stream. */
static void decode_plain(const EdgeTensor *tensor, Cursor *in, uint8_t *data, Arena memory) {
    const uint32_t size = tensor->element_size, step = tensor->codec == EDGE_RAW ? size : 0;
    (void)memory;
    if (tensor->codec == EDGE_HALF) {
        require(in, tensor->dtype == EDGE_FLOAT32);
        expand_halves(in, tensor->elements, data);
        return;
    }
    const uint8_t *values = take(in, step > 0 ? tensor->data_size : size);
    for (size_t i = 0; data != NULL && i < tensor->elements; ++i) copy(data + i * size, values + i * step, size);
}

static void decode_dense(const EdgeTensor *tensor, Cursor *in, uint8_t *data, Arena memory) {
    const uint32_t block = tensor->codec == EDGE_DENSE ? 1 : number(in, 1), size = block * tensor->element_size;
    if (tensor->codec == EDGE_BLOCKS && !require(in, (block == 2 || block == 4) && tensor->dimensions > 0 &&
                                                     tensor->shape[tensor->dimensions - 1] % block == 0)) return;
    const Codebook book = codebook_head(in, tensor, block * MAX_ALPHABET);
    const uint8_t *values = codebook_values(in, tensor, book, &memory);
    require(in, book.size % block == 0);
    const Cursor rest = part(in, left(in));
    expand(open_stream(rest, tensor->elements / block, book.size / block, &memory), values, size, data, size, 0);
}

static void decode_planes(const EdgeTensor *tensor, Cursor *in, uint8_t *data, Arena memory) {
    for (uint32_t i = 0; i < tensor->element_size; ++i) {
        Arena of_plane = memory;
        const Stream stream = open_stream(part(in, varint(in, MAX_BYTES)), tensor->elements, 256, &of_plane);
        expand(stream, NULL, 1, data == NULL ? NULL : data + i, tensor->element_size, 0);
    }
}

/* Gaps first: they leave a mark at every element that has a value; then the values, in the same place. */
static void decode_sparse(const EdgeTensor *tensor, Cursor *in, uint8_t *data, Arena memory) {
    const uint32_t elements = tensor->elements, size = tensor->element_size;
    const Codebook book = codebook_head(in, tensor, MAX_ALPHABET);
    const uint8_t *values = codebook_values(in, tensor, book, &memory);
    const uint32_t live = varint(in, elements), escape = number(in, 1);
    if (!require(in, escape >= 14 && ((escape + 2) & (escape + 1)) == 0)) return; /* 14, 30, 62, 126, 254 */
    const uint32_t count = varint(in, elements + elements / escape);
    Arena of_gaps = memory;
    Stream gaps = open_stream(part(in, varint(in, MAX_BYTES)), count, escape + 1, &of_gaps);
    uint64_t place = 0, found = 0, gap = 0;
    if (data != NULL) memset(data, 0, tensor->data_size);
    while (data != NULL && gaps.left > 0 && !*in->damaged) {
        place += gap = next_symbol(&gaps);
        if (gap != escape && require(in, place < elements)) data[place++ * size] = 1, ++found;
    }
    if (gaps.left == 0) close_stream(&gaps), require(in, found == live && gap != escape);
    expand(open_stream(part(in, left(in)), live, book.size, &memory), values, size, data, size, 1);
}

/* One pass of the context codec: all rows of a column side by side, under what the columns before say of each. */
typedef struct {
    Cursor *in;  /* of the words */
    Bits *lower; /* lower bits of codes, which are stored apart */
    uint32_t rows, columns, height, width, size, lanes, *states;
    uint64_t padded; /* rows, to a multiple of eight */
    uint32_t weighting, directions, energies, mean, base, step; /* how contexts are made; 0 directions: of a mask */
    uint32_t alphabet, zero, shift, symbols, partial; /* partial: only elements that the mask has set have a code */
    uint32_t *counts, *totals, *made_of, *row_sums;
    uint16_t *cumulative;
    int16_t *context_of, *levels; /* levels: of a column of zeros, and of three lines of a plane */
} Pass;

/* Halves counts that have become large, and makes a table anew whose counts have grown by a sixteenth. */
static void refresh(Pass *p, uint32_t context) {
    uint32_t *counts = p->counts + (size_t)context * p->symbols, *total = p->totals + context, sum = 0;
    uint16_t *cumulative = p->cumulative + (size_t)context * (p->symbols + 1);
    if (*total > 1u << 16) {
        for (uint32_t i = 0; i < p->symbols; ++i) sum += counts[i] = (counts[i] + 1) >> 1;
        *total = p->made_of[context] = sum;
    }
    if (16 * (uint64_t)*total < 17 * (uint64_t)p->made_of[context]) return;
    p->made_of[context] = *total;
    for (uint32_t i = sum = 0; i < p->symbols; ++i)
        cumulative[i + 1] = (uint16_t)((sum += counts[i]) * (0x8000ull - p->symbols) / *total + i + 1);
}

/* 16 x log2 of a number below 2**24, straight lines between powers of two. */
static uint32_t logarithm(uint64_t value) { return value > 1 ? (float_bits((uint32_t)value) >> 19) - (127u << 4) : 0; }

/* Levels at a place of the plane, or zeros where there is none: beyond its upper and left side numbers wrap around. */
static int16_t *levels_at(const Pass *p, uint32_t line, uint32_t place) {
    const int inside = line < p->height && place < p->width;
    return p->levels + (inside ? (line % 3 * (uint64_t)p->width + place + 1) * p->padded : 0);
}

/* Of eight rows: so many compilers add them at once. */
static inline void add_magnitudes(int16_t *restrict sums, const int16_t *restrict levels) {
    for (uint32_t i = 0; i < 8; ++i) sums[i] = (int16_t)(sums[i] + (levels[i] < 0 ? -levels[i] : levels[i]));
}

static void find_contexts(const Pass *p, uint32_t column) {
    static const uint8_t WEIGHTS[3][3] = {{4, 6, 6}, {6, 4, 6}, {8, 2, 8}};
    static const int8_t BORDERS[4][6] = {{0}, {-14, 14}, {-30, -10, 10, 30}, {-40, -20, -6, 6, 20, 40}};
    const uint32_t line = column / p->width % p->height, place = column % p->width, rows = p->rows, mean = p->mean;
    const int16_t *left_of = levels_at(p, line, place - 1), *above = levels_at(p, line - 1, place);
    const int16_t *corner = levels_at(p, line - 1, place - 1);
    const uint8_t *weights = WEIGHTS[p->weighting];
    const int8_t *borders = BORDERS[p->directions / 2];
    int16_t *near = p->context_of; /* first the sums of what is near, then the contexts */
    uint32_t count = 0;
    uint64_t total = 0;
    memset(near, 0, 2 * (size_t)p->padded);
    for (uint32_t i = 3; i < 15; ++i) { /* two places to the left, and five places each of two lines above */
        const int16_t *levels = levels_at(p, line - i / 5, place + 2 - i % 5);
        count += levels != p->levels;
        for (uint32_t row = 0; row < rows && levels != p->levels; row += 8) add_magnitudes(near + row, levels + row);
    }
    for (uint32_t row = 0; row < rows; ++row) total += (uint16_t)near[row];
    total = (64 * total + (uint64_t)rows * mean) / ((uint64_t)rows * (count + 1));
    const uint32_t of_column = weights[2] * logarithm(total);
    for (uint32_t row = 0; row < rows; ++row) {
        const uint32_t row_log = logarithm((64 * (uint64_t)p->row_sums[row] + 8 * (uint64_t)mean) / (column + 8));
        const uint32_t near_log = logarithm((64 * (uint32_t)near[row] + 2 * mean) / (count + 2));
        const uint32_t energy = weights[0] * row_log + weights[1] * near_log + of_column;
        const uint32_t level = energy < p->base ? 0 : least((energy - p->base) / p->step, p->energies - 1);
        const int32_t direction = 640 * (2 * (left_of[row] + above[row]) - corner[row]);
        uint32_t class = p->directions == 0 ? (left_of[row] != 0) + (above[row] != 0) : 0;
        for (uint32_t i = 0; i + 1 < p->directions; ++i) class += borders[i] * (int32_t)mean < direction;
        near[row] = (int16_t)(level * (p->directions == 0 ? 3 : p->directions) + class);
    }
}

static void decode_column(const Pass *pass, uint32_t column, uint8_t *data) {
    const Pass p = *pass; /* copies, which no byte that is written can change */
    Cursor in = *p.in;
    int16_t *here = levels_at(&p, column / p.width % p.height, column % p.width);
    uint32_t lane = 0, middle = p.zero >> p.shift;
    for (uint32_t row = 0; row < p.rows; ++row) {
        uint8_t *at = data + ((size_t)row * p.columns + column) * p.size;
        uint32_t code = p.zero, symbol = 0;
        here[row] = 0;
        if (!p.partial || *at == 1) {
            const uint32_t context = (uint32_t)p.context_of[row], state = p.states[lane], slot = state & 0x7FFF;
            const uint16_t *cumulative = p.cumulative + (size_t)context * (p.symbols + 1);
            for (uint32_t count = p.symbols; count > 1; count -= count / 2)
                symbol += count / 2 & (0u - (cumulative[symbol + count / 2] <= slot));
            const uint32_t start = cumulative[symbol], frequency = cumulative[symbol + 1] - start;
            p.states[lane] = filled(&in, frequency * (state >> 15) + slot - start);
            lane = lane + 1 < p.lanes ? lane + 1 : 0;
            p.counts[(size_t)context * p.symbols + symbol] += 5;
            p.totals[context] += 5;
            here[row] = (int16_t)((int32_t)(symbol + (p.partial && symbol >= middle)) - (int32_t)middle);
            p.row_sums[row] += (uint32_t)(here[row] < 0 ? -here[row] : here[row]);
            code = p.shift == 0 ? symbol : symbol << p.shift | bits(p.lower, p.shift);
            code += p.partial && code >= p.zero;
            require(&in, code < p.alphabet);
        }
        at[0] = (uint8_t)code; /* codes are kept in the first two bytes of their elements */
        if (p.size > 1) at[1] = (uint8_t)(code >> 8);
    }
    *p.in = in;
}

static void decode_pass(Pass *p, uint8_t *data, Arena memory) {
    const uint64_t rows = p->padded = (p->rows + 7) & ~7u, columns = 1 + least(p->height, 3) * (uint64_t)p->width;
    const uint32_t contexts = p->energies * (p->directions == 0 ? 3 : p->directions), cells = contexts * p->symbols;
    p->counts = reserve(&memory, 4ull * cells), p->cumulative = reserve(&memory, 2ull * (cells + contexts));
    p->totals = reserve(&memory, 4ull * contexts), p->made_of = reserve(&memory, 4ull * contexts);
    p->row_sums = reserve(&memory, 4 * rows), p->context_of = reserve(&memory, 2 * rows);
    p->levels = reserve(&memory, 2 * rows * columns);
    for (uint32_t i = 0; data != NULL && i < cells; ++i) p->counts[i] = 2, p->totals[i / p->symbols] += 2;
    for (uint32_t column = 0; data != NULL && column < p->columns && !*p->in->damaged; ++column) {
        for (uint32_t context = 0; context < contexts; ++context) refresh(p, context);
        find_contexts(p, column);
        decode_column(p, column, data);
    }
}

static Pass read_pass(Cursor *in, Pass p) {
    const uint32_t kind = number(in, 1);
    p.weighting = kind >> 4, p.directions = kind & 15, p.energies = number(in, 1);
    p.mean = varint(in, 64 * 256), p.base = varint(in, 1 << 16), p.step = varint(in, 1 << 16);
    require(in, p.weighting < 3 && p.energies >= 1 && p.energies <= 64 && p.mean > 0 && p.step > 0);
    return p;
}

static void decode_context(const EdgeTensor *tensor, Cursor *in, uint8_t *data, Arena memory) {
    const uint32_t size = tensor->element_size;
    const Codebook book = codebook_head(in, tensor, size == 1 ? 256 : 4096);
    const uint8_t *values = book.form == CONSECUTIVE ? codebook_values(in, tensor, book, &memory) : NULL;
    if (!require(in, tensor->dimensions >= 2 && tensor->elements > 0)) return;
    const uint64_t steps = 6 * (uint64_t)left(in); /* a small file must not ask for much work */
    const uint32_t rows = tensor->shape[0], columns = tensor->elements / rows;
    Bits lower = {.in = *in};
    Pass p = {.in = in, .lower = &lower, .rows = rows, .columns = columns, .size = size}, mask;
    const uint32_t flags = number(in, 1), masked = flags & 1;
    p.height = varint(in, columns), p.width = varint(in, columns), p.zero = varint(in, book.size - 1);
    const uint64_t plane = (uint64_t)p.height * p.width;
    require(in, flags < 16 && columns <= 1u << 20 && rows <= 1u << 28 && book.size > masked);
    if (!require(in, plane > 0 && columns % plane == 0)) return;
    if (masked) mask = read_pass(in, p), require(in, mask.directions == 0);
    p = read_pass(in, p), require(in, p.directions % 2 == 1 && p.directions < 8);
    p.alphabet = book.size, p.partial = masked, p.shift = flags >> 1;
    p.symbols = ((p.alphabet - masked - 1) >> p.shift) + 1;
    const uint32_t exponent = number(in, 1);
    p.lanes = 1u << (exponent & 15);
    require(in, p.symbols <= 256 && exponent <= 10);
    if (!require(in, (uint64_t)columns * ((rows - 1) / p.lanes + 1) * (1 + masked) <= steps)) return;
    const uint32_t riders = book.form == CONSECUTIVE ? 0 : book.size * (book.form == AS_HALF ? 2 : size);
    const uint32_t carried = least(riders, 2 * p.lanes);
    const uint8_t *plain = take(in, riders - carried);
    lower.in = part(in, p.shift > 0 ? varint(in, tensor->elements) : 0);
    Bits packed = {.in = *in};
    p.states = reserve(&memory, 4 * (uint64_t)p.lanes);
    for (uint32_t lane = 0; lane < p.lanes; ++lane) {
        const uint32_t below = 16 + bits(&packed, 4), rest = bits(&packed, below);
        if (p.states != NULL) p.states[lane] = 1u << below | rest;
    }
    take(in, (packed.position + 7) / 8);
    if (masked) {
        mask.lanes = p.lanes, mask.states = p.states, mask.alphabet = mask.symbols = 2, mask.zero = 0;
        decode_pass(&mask, data, memory);
    }
    decode_pass(&p, data, memory);
    uint8_t *ridden = reserve(&memory, riders);
    if (data == NULL) reserve(&memory, (uint64_t)book.size * size), take(in, left(in));
    if (data == NULL || !require(in, 8 * (uint64_t)left(&lower.in) - lower.position < 8)) return;
    for (uint32_t i = 0; i < p.lanes; ++i) require(in, p.states[i] - LOW < LOW);
    for (uint32_t i = 0; i < carried; ++i) ridden[i] = (uint8_t)(p.states[i / 2] >> 8 * (i % 2));
    memcpy(ridden + carried, plain, riders - carried);
    Cursor from = {ridden, ridden + riders, in->damaged};
    if (values == NULL) values = codebook_values(&from, tensor, book, &memory);
    for (size_t i = 0; !*in->damaged && i < tensor->data_size; i += size)
        copy(data + i, values + (size > 1 ? data[i] | (size_t)data[i + 1] << 8 : data[i]) * size, size);
}

static int decode(const EdgeTensor *tensor, uint8_t *data, Arena memory) {
    static void (*const DECODERS[])(const EdgeTensor *, Cursor *, uint8_t *, Arena) = {decode_plain, decode_plain,
        decode_plain, decode_planes, decode_dense, decode_sparse, decode_dense, decode_context};
    int damaged = 0;
    Cursor in = {tensor->payload, tensor->payload + tensor->payload_size, &damaged};
    DECODERS[tensor->codec](tensor, &in, data, memory);
    return !require(&in, left(&in) == 0);
}

static uint32_t crc32(const uint8_t *data, size_t size) {
    static const uint32_t TABLE[16] = {0, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158,
        0x5005713C, 0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < 2 * size; ++i) crc = crc >> 4 ^ TABLE[(crc ^ data[i / 2] >> i % 2 * 4) & 15];
    return ~crc;
}

EdgeStatus edge_open(const uint8_t *file, size_t size, EdgeFile *out) {
    int damaged = 0;
    Cursor in = {file, file + size, &damaged}, tensors = in;
    const uint8_t *head = take(&in, 6);
    if (head == NULL || memcmp(head, "EDGE", 4) != 0) return EDGE_NO_EDGE;
    if (head[4] != 2) return EDGE_VERSION;
    Cursor entries = part(&in, 9 * (size_t)head[5]);
    uint32_t checksum = number(&in, 4);
    if (damaged) return EDGE_DAMAGED;
    if (crc32(file, (size_t)(entries.end - file)) != checksum) return EDGE_CHECKSUM;
    uint8_t seen[256] = {0};
    while (left(&entries) > 0 && !damaged) {
        const uint32_t kind = number(&entries, 1), length = number(&entries, 4), sum = number(&entries, 4);
        const Cursor section = part(&in, length);
        require(&in, !seen[kind]++);
        if (kind == 3) tensors = section, checksum = sum;
    }
    if (!require(&in, left(&in) == 0 && seen[3])) return EDGE_DAMAGED;
    *out = (EdgeFile){tensors.at, tensors.end};
    return crc32(tensors.at, left(&tensors)) == checksum ? EDGE_OK : EDGE_CHECKSUM;
}

EdgeStatus edge_next(EdgeFile *file, EdgeTensor *out) {
    static const uint8_t SIZES[17] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};
    int damaged = 0;
    uint64_t peak = 0;
    Cursor in = {file->next, file->end, &damaged};
    if (left(&in) == 0) return EDGE_END;
    const uint32_t dtype = number(&in, 1), dimensions = varint(&in, EDGE_MAX_DIMENSIONS);
    *out = (EdgeTensor){.dtype = (EdgeDtype)dtype, .dimensions = dimensions, .elements = 1};
    uint64_t bound = out->element_size = dtype < sizeof SIZES ? SIZES[dtype] : 0;
    require(&in, bound > 0);
    for (uint32_t i = 0; i < dimensions && !damaged; ++i) { /* other readers refuse large sizes beside a zero too */
        out->shape[i] = varint(&in, MAX_BYTES);
        bound *= out->shape[i] > 0 ? out->shape[i] : 1;
        if (require(&in, bound <= MAX_BYTES)) out->elements *= out->shape[i];
    }
    const uint32_t codec = number(&in, 1);
    require(&in, codec <= EDGE_CONTEXT);
    const Cursor payload = part(&in, varint(&in, MAX_BYTES));
    out->codec = (EdgeCodec)codec, out->payload = payload.at, out->payload_size = left(&payload);
    out->data_size = (size_t)out->elements * out->element_size;
    if (damaged || decode(out, NULL, (Arena){NULL, 0, &peak})) return EDGE_DAMAGED;
    if (peak > SIZE_MAX - 7) return EDGE_NO_MEMORY;
    out->workspace_size = peak == 0 ? 0 : (size_t)peak + 7;
    file->next = in.at;
    return EDGE_OK;
}

EdgeStatus edge_decode(const EdgeTensor *tensor, void *data, size_t data_size, void *workspace, size_t workspace_size) {
    if (data_size < tensor->data_size || workspace_size < tensor->workspace_size) return EDGE_NO_MEMORY;
    uint64_t peak = 0;
    uint8_t *base = workspace == NULL ? NULL : (uint8_t *)workspace + (8 - (uintptr_t)workspace % 8) % 8;
    return decode(tensor, data, (Arena){base, 0, &peak}) ? EDGE_DAMAGED : EDGE_OK;
}

const char *edge_status_text(EdgeStatus status) {
    static const char *const TEXTS[] = {"fine", "no tensor is left", "this is no .edge file",
        "the file is of another version", "the file does not match its checksum", "the file is damaged",
        "the memory given is smaller than the tensor says"};
    return (size_t)status < sizeof TEXTS / sizeof *TEXTS ? TEXTS[status] : "unknown status";
}
