/* See edge_decode.h for how to use it, FORMAT.md for what the bytes mean. */
#include "edge_decode.h"
#include <string.h>

#define MAX_BYTES 0x7FFFFFFFu /* of a tensor */
#define MAX_ALPHABET 8192u
#define LOW 0x10000u /* a state below it takes in two bytes */

static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* Bytes, read with suspicion: once something was wrong, all reads give 0 or NULL, and `damaged` tells. */
typedef struct { const uint8_t *at, *end; int damaged; } Cursor;

static size_t left(const Cursor *in) { return (size_t)(in->end - in->at); }

static inline int require(Cursor *in, int holds) {
    if (!holds) *in = (Cursor){in->end, in->end, 1};
    return !in->damaged;
}
static const uint8_t *take(Cursor *in, uint64_t size) {
    if (!require(in, !in->damaged && size <= left(in))) return NULL;
    in->at += size;
    return in->at - size;
}
static Cursor part(Cursor *in, uint64_t size) {
    const uint8_t *start = take(in, size);
    return start == NULL ? *in : (Cursor){start, in->at, 0};
}
static uint64_t little(const uint8_t *at, uint32_t size) {
    uint64_t value = 0;
    while (at != NULL && size-- > 0) value = value << 8 | at[size];
    return value;
}
static uint32_t number(Cursor *in, uint32_t size) { return (uint32_t)little(take(in, size), size); }

static uint32_t varint(Cursor *in, uint32_t limit) {
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 35; shift += 7) {
        const uint32_t digit = number(in, 1);
        value |= (uint64_t)(digit & 0x7F) << shift;
        if (digit < 0x80) return require(in, value <= limit) ? (uint32_t)value : 0;
    }
    return (uint32_t)require(in, 0);
}

/* Bits of a cursor, most significant first. */
typedef struct { Cursor *in; uint32_t held, count; } Bits;

static uint32_t bits(Bits *from, uint32_t width) {
    uint32_t value = 0;
    for (; width > 0; --width, value = value << 1 | (from->held >> --from->count & 1))
        if (from->count == 0) from->held = number(from->in, 1), from->count = 8;
    return value;
}
static uint32_t exp_golomb(Bits *from, uint32_t order, uint32_t limit) {
    uint32_t zeros = 0;
    while (zeros < 16 && bits(from, 1) == 0) ++zeros; /* limits are at most 2**14: 16 zeros are too many */
    const uint32_t value = (1u << (zeros + order) | bits(from, zeros + order)) - (1u << order);
    return require(from->in, zeros < 16 && value <= limit) ? value : 0;
}

static void copy(uint8_t *to, const uint8_t *from, uint32_t size) {
    if (size == 4) memcpy(to, from, 4); /* of a size that is known: one instruction */
    else if (size == 1) *to = *from;
    else memcpy(to, from, size);
}
static void store(uint8_t *at, uint64_t value, uint32_t size) {
    for (; size > 0; --size, value >>= 8) *at++ = (uint8_t)value;
}

/* The caller's workspace, handed out piece by piece; without one, only how much it must have is found. */
typedef struct { uint8_t *base; uint64_t used, peak; } Arena;

static void *reserve(Arena *memory, uint64_t size) {
    const uint64_t start = memory->used;
    memory->used += (size + 7) & ~(uint64_t)7;
    if (memory->used > memory->peak) memory->peak = memory->used;
    return memory->base == NULL ? NULL : memory->base + start;
}

/* What the next bits, or the lower bits of a state, stand for; size: length of the code, or frequency. */
typedef struct { uint16_t symbol, size, offset; } Entry;

static uint32_t fill(Entry *table, uint32_t start, uint32_t count, uint32_t symbol, uint32_t size) {
    for (uint32_t i = 0; table != NULL && i < count; ++i)
        table[start + i] = (Entry){(uint16_t)symbol, (uint16_t)size, (uint16_t)i};
    return start + count;
}

/* A stream of symbols. */
typedef struct {
    Cursor in, sizes; /* what follows; sizes of the Huffman chunks that follow */
    uint32_t coder, alphabet, left, only, width, *states, lanes, lane; /* width: bits that look up the table */
    Entry *table;
    uint64_t window, position, chunk_end;
    uint32_t held, chunk, chunk_left; /* Huffman: bits in the window, and symbols */
} Stream;
enum { CONSTANT, HUFFMAN, RANS, PLAIN };

static uint32_t nibble(const uint8_t *at, uint32_t i) { return at[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15u; }

static void open_huffman(Stream *s, Arena *memory) {
    const uint8_t *lengths = take(&s->in, (s->alphabet + 1) / 2);
    uint32_t taken = 0, next = 0;
    for (uint32_t symbol = 0; lengths != NULL && symbol < s->alphabet; ++symbol) {
        const uint32_t length = nibble(lengths, symbol);
        if (length > s->width) s->width = length;
        if (length > 0) taken += 1u << (15 - length);
    }
    const uint32_t chunks = varint(&s->in, s->left);
    if (chunks > 0) s->chunk = s->chunk_left = (s->left + chunks - 1) / chunks;
    require(&s->in, chunks > 0 && s->chunk <= 1u << 15 && (uint64_t)s->chunk * (chunks - 1) < s->left);
    require(&s->in, taken > 0 && taken <= 1u << 15); /* Kraft's inequality: there is room for every code */
    s->sizes = s->in;
    for (uint32_t chunk = 1; chunk < chunks && !s->in.damaged; ++chunk) varint(&s->in, 15 * s->chunk);
    s->table = reserve(memory, sizeof(Entry) << s->width);
    for (uint32_t length = 1; length <= s->width && !s->in.damaged; ++length)
        for (uint32_t symbol = 0; symbol < s->alphabet; ++symbol) /* in this order the codes leave no gaps */
            if (nibble(lengths, symbol) == length)
                next = fill(s->table, next, 1u << (s->width - length), symbol, length);
    if (!s->in.damaged) fill(s->table, next, (1u << s->width) - next, MAX_ALPHABET, 1); /* no code begins so */
}

static void open_rans(Stream *s, Arena *memory) {
    s->width = number(&s->in, 1);
    const uint32_t order = number(&s->in, 1), total = 1u << (s->width & 15);
    if (!require(&s->in, s->width >= 6 && s->width <= 14 && s->width % 2 == 0 && order <= 12)) return;
    Bits from = {&s->in, 0, 0};
    uint32_t start = 0, frequency;
    s->table = reserve(memory, sizeof(Entry) * total);
    for (uint32_t symbol = 0; symbol < s->alphabet && !s->in.damaged; ++symbol) {
        frequency = symbol + 1 < s->alphabet ? exp_golomb(&from, order, total - start) : total - start;
        start = fill(s->table, start, frequency, symbol, frequency);
    }
    s->lanes = varint(&s->in, least(8192, s->left));
    require(&s->in, s->lanes > 0 && (s->lanes == 8192 || (uint64_t)s->lanes << 14 >= s->left));
    s->states = reserve(memory, 4 * (uint64_t)s->lanes);
    Cursor states = part(&s->in, 4 * (uint64_t)s->lanes);
    for (uint32_t i = 0; s->states != NULL && left(&states) > 0; ++i) s->states[i] = number(&states, 4);
}

/* Prepares to decode `count` symbols from all that `in` holds. */
static Stream open_stream(Cursor in, uint32_t count, uint32_t alphabet, Arena *memory) {
    const uint32_t coder = number(&in, 1);
    Stream s = {.in = in, .coder = coder, .alphabet = alphabet, .left = count};
    if (coder == CONSTANT) {
        s.only = number(&s.in, alphabet > 256 ? 2 : 1);
        require(&s.in, s.only < alphabet && left(&s.in) == 0);
    } else if (require(&s.in, coder <= PLAIN && count > 0 && alphabet > 1) && coder != PLAIN) {
        (coder == HUFFMAN ? open_huffman : open_rans)(&s, memory);
    }
    return s;
}

/* At least 57 bits from a place on; beyond the end there are zeros. */
static uint64_t window(const Cursor *in, uint64_t position) {
    uint64_t value = 0, first = position >> 3;
    const uint32_t there = first < left(in) ? (left(in) - first < 8 ? (uint32_t)(left(in) - first) : 8) : 0;
    for (uint32_t i = 0; there == 8 && i < 8; ++i) value = value << 8 | in->at[first + i]; /* compilers see one load */
    for (uint32_t i = 0; there < 8 && i < 8; ++i) value = value << 8 | (i < there ? in->at[first + i] : 0);
    return value << (position & 7);
}

/* A state that has become low takes in two bytes; without a branch, which nobody could predict. */
static inline uint32_t filled(Cursor *in, uint32_t state) {
    const uint32_t low = state < LOW, there = left(in) >= 2, word = there ? in->at[0] | (uint32_t)in->at[1] << 8 : 0;
    if (low > there) return (uint32_t)require(in, 0);
    in->at += 2 * low;
    return state << 16 * low | (word & (0u - low));
}

static uint32_t next_huffman(Stream *s) {
    if (s->chunk_left-- == 0) {
        s->chunk_end += varint(&s->sizes, 15 * s->chunk);
        require(&s->in, s->position == s->chunk_end);
        s->chunk_left = s->chunk - 1;
    }
    if (s->held < s->width) s->window = window(&s->in, s->position), s->held = 57;
    const Entry code = s->table[s->window >> (64 - s->width)];
    s->window <<= code.size, s->held -= code.size, s->position += code.size;
    return code.symbol;
}
static uint32_t next_symbol(Stream *s) {
    --s->left;
    if (s->coder == RANS) {
        const uint32_t state = s->states[s->lane];
        const Entry entry = s->table[state & ((1u << s->width) - 1)];
        s->states[s->lane] = filled(&s->in, entry.size * (state >> s->width) + entry.offset);
        s->lane = s->lane + 1 < s->lanes ? s->lane + 1 : 0;
        return entry.symbol;
    }
    const uint32_t symbol = s->coder == HUFFMAN ? next_huffman(s) : s->coder == PLAIN ? number(&s->in, 1) : s->only;
    return require(&s->in, symbol < s->alphabet) ? symbol : 0;
}

/* A stream must end where its bytes end, and its states where the encoder began. */
static int close_stream(Stream *s) {
    require(&s->in, 8 * (uint64_t)left(&s->in) - s->position < (s->coder == HUFFMAN ? 8 : 1));
    for (uint32_t lane = 0; lane < s->lanes; ++lane) require(&s->in, s->states[lane] == LOW);
    return s->in.damaged;
}

/* Writes what each symbol stands for, `size` bytes, `stride` bytes apart; nothing where memory is measured. */
static int expand(Stream s, const uint8_t *values, uint32_t size, uint8_t *to, size_t stride) {
    for (size_t at = 0; to != NULL && s.left > 0 && !s.in.damaged; at += stride) {
        const uint32_t symbol = next_symbol(&s);
        if (values == NULL) to[at] = (uint8_t)symbol;
        else copy(to + at, values + (size_t)symbol * size, size);
    }
    return to == NULL ? s.in.damaged : close_stream(&s);
}

static void expand_halves(Cursor *in, uint32_t count, uint8_t *to) {
    for (uint32_t i = 0; i < count && !in->damaged; ++i) {
        const uint32_t half = number(in, 2);
        uint32_t exponent = (half >> 10 & 31) + 112, fraction = half & 0x3FF;
        if (exponent == 112) /* no leading one: look for it */
            for (exponent = fraction == 0 ? 0 : 113; fraction > 0 && fraction < 0x400; --exponent) fraction <<= 1;
        if (exponent == 143) exponent = 255; /* infinite */
        require(in, exponent < 255 || fraction == 0); /* a NaN would not keep its bits: none is stored so */
        if (to != NULL) store(to + 4 * (size_t)i, (half >> 15) << 31 | exponent << 23 | (fraction & 0x3FF) << 13, 4);
    }
}

/* How many values a codebook has, and how they are stored. */
typedef struct { uint32_t size, form; } Codebook;
enum { AS_THEY_ARE, AS_HALF, CONSECUTIVE };

static Codebook codebook_head(Cursor *in, const EdgeTensor *tensor, uint32_t limit) {
    const uint32_t size = varint(in, limit), form = number(in, 1);
    const int whole = 0x130FC >> tensor->dtype & 1; /* integers; a bfloat16 is the number that its bits make */
    require(in, form == AS_HALF ? tensor->dtype == EDGE_FLOAT32 : form == CONSECUTIVE ? whole : form == AS_THEY_ARE);
    require(in, size > 0);
    return (Codebook){size, form};
}
static const uint8_t *codebook_values(Cursor *in, const EdgeTensor *tensor, Codebook book, Arena *memory) {
    const uint32_t size = tensor->element_size;
    if (book.form == AS_THEY_ARE) return take(in, (uint64_t)book.size * size);
    uint8_t *values = reserve(memory, (uint64_t)book.size * size);
    if (book.form == AS_HALF) return expand_halves(in, book.size, values), values;
    const uint64_t first = little(take(in, size), size);
    for (uint32_t i = 0; values != NULL && i < book.size; ++i) store(values + (size_t)i * size, first + i, size);
    return values;
}

static int decode_dense(const EdgeTensor *tensor, Cursor in, uint8_t *data, Arena *memory) {
    const uint32_t block = tensor->codec == EDGE_DENSE ? 1 : number(&in, 1), last = tensor->dimensions - 1;
    if (tensor->codec == EDGE_BLOCKS && (block != 2 && block != 4)) return 1;
    require(&in, tensor->codec == EDGE_DENSE || (tensor->dimensions > 0 && tensor->shape[last] % block == 0));
    const Codebook book = codebook_head(&in, tensor, block * MAX_ALPHABET);
    const uint8_t *values = codebook_values(&in, tensor, book, memory);
    require(&in, book.size % block == 0);
    const uint32_t size = block * tensor->element_size;
    return expand(open_stream(in, tensor->elements / block, book.size / block, memory), values, size, data, size);
}

static int decode_planes(const EdgeTensor *tensor, Cursor in, uint8_t *data, Arena *memory) {
    for (uint32_t i = 0; i < tensor->element_size && !in.damaged; ++i, memory->used = 0) {
        const Stream stream = open_stream(part(&in, varint(&in, MAX_BYTES)), tensor->elements, 256, memory);
        require(&in, !expand(stream, NULL, 1, data == NULL ? NULL : data + i, tensor->element_size));
    }
    return in.damaged || left(&in) > 0;
}

/* Gaps first: they leave a mark at every element that has a value; then the values, in the same place. */
static int decode_sparse(const EdgeTensor *tensor, Cursor in, uint8_t *data, Arena *memory) {
    const uint32_t elements = tensor->elements, size = tensor->element_size;
    const Codebook book = codebook_head(&in, tensor, MAX_ALPHABET);
    const uint8_t *values = codebook_values(&in, tensor, book, memory);
    const uint64_t mark = memory->used;
    const uint32_t live = varint(&in, elements), escape = number(&in, 1);
    if (!require(&in, escape >= 14 && ((escape + 2) & (escape + 1)) == 0)) return 1; /* 14, 30, 62, 126, 254 */
    const uint32_t count = varint(&in, elements + elements / escape);
    Stream gaps = open_stream(part(&in, varint(&in, MAX_BYTES)), count, escape + 1, memory);
    uint64_t place = 0, found = 0, gap = 0;
    if (data != NULL) memset(data, 0, tensor->data_size);
    while (data != NULL && gaps.left > 0 && !gaps.in.damaged) {
        place += gap = next_symbol(&gaps);
        if (gap != escape && require(&gaps.in, place < elements)) data[place++ * size] = 1, ++found;
    }
    require(&in, data == NULL ? !gaps.in.damaged : found == live && gap != escape && !close_stream(&gaps));
    memory->used = mark;
    Stream stream = open_stream(in, live, book.size, memory);
    for (size_t at = 0; data != NULL && at < tensor->data_size && !stream.in.damaged; at += size)
        if (data[at] == 1) copy(data + at, values + (size_t)next_symbol(&stream) * size, size);
    return data == NULL ? stream.in.damaged : close_stream(&stream);
}

/* One pass of the context codec: all rows of a column side by side, under what the columns before say of each. */
typedef struct {
    Cursor in;  /* of the stream */
    Bits lower; /* lower bits of codes, which are stored apart */
    uint32_t rows, columns, height, width, size, lanes, *states;
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
    for (uint32_t i = sum = 0; i < p->symbols; ++i) {
        const uint64_t share = (sum += counts[i]) * ((1ull << 15) - p->symbols);
        cumulative[i + 1] = (uint16_t)((share <= UINT32_MAX ? (uint32_t)share / *total : share / *total) + i + 1);
    }
}

/* 16 x log2 of a number below 2**24, straight lines between powers of two: the upper bits of a float. */
static uint32_t logarithm(uint64_t value) {
    const float at_least_1 = value > 1 ? (float)(uint32_t)value : 1.0f;
    uint32_t upper;
    memcpy(&upper, &at_least_1, 4);
    return (upper >> 19) - (127u << 4);
}

/* Levels at a place of the plane, or zeros where there is none: beyond its upper and left side numbers wrap around. */
static int16_t *levels_at(const Pass *p, uint32_t line, uint32_t place) {
    const int inside = line < p->height && place < p->width;
    return p->levels + (inside ? (line % 3 * (size_t)p->width + place + 1) * ((p->rows + 7) & ~7u) : 0);
}

/* Of eight rows: so many compilers add them at once. */
static inline void add_magnitudes(int16_t *restrict sums, const int16_t *restrict levels) {
    for (uint32_t i = 0; i < 8; ++i) sums[i] = (int16_t)(sums[i] + (levels[i] < 0 ? -levels[i] : levels[i]));
}

static void find_contexts(const Pass *p, uint32_t column) {
    static const uint8_t WEIGHTS[3][3] = {{4, 6, 6}, {6, 4, 6}, {8, 2, 8}};
    static const int8_t BORDERS[4][6] = {{0}, {-14, 14}, {-30, -10, 10, 30}, {-40, -20, -6, 6, 20, 40}};
    const uint32_t line = column / p->width % p->height, place = column % p->width, rows = p->rows, mean = p->mean;
    const uint32_t of_row = WEIGHTS[p->weighting][0], of_near = WEIGHTS[p->weighting][1], base = p->base;
    const uint32_t highest = p->energies - 1, directions = p->directions, step = p->step, *sums = p->row_sums;
    const int16_t *left_of = levels_at(p, line, place - 1), *above = levels_at(p, line - 1, place);
    const int16_t *corner = levels_at(p, line - 1, place - 1);
    int16_t *near = p->context_of; /* first the sums of what is near, then the contexts */
    uint32_t count = 0;
    uint64_t total = 0;
    memset(near, 0, 2 * (size_t)((rows + 7) & ~7u));
    for (uint32_t i = 3; i < 15; ++i) { /* two places to the left, and five places each of two lines above */
        const int16_t *levels = levels_at(p, line - i / 5, place - (i < 5 ? i - 2 : i % 5 - 2));
        if (levels == p->levels) continue;
        ++count;
        for (uint32_t row = 0; row < rows; row += 8) add_magnitudes(near + row, levels + row);
    }
    for (uint32_t row = 0; row < rows; ++row) total += (uint16_t)near[row];
    total = (64 * total + (uint64_t)rows * mean) / ((uint64_t)rows * (count + 1));
    const uint32_t of_column = WEIGHTS[p->weighting][2] * logarithm(total);
    int32_t borders[6];
    for (uint32_t i = 0; i < 6; ++i) borders[i] = BORDERS[directions / 2][i] * (int32_t)mean;
    for (uint32_t row = 0; row < rows; ++row) {
        const uint32_t row_log = logarithm((64 * (uint64_t)sums[row] + 8 * (uint64_t)mean) / (column + 8));
        const uint32_t near_log = logarithm((64 * (uint32_t)near[row] + 2 * mean) / (count + 2));
        const uint32_t energy = of_row * row_log + of_near * near_log + of_column;
        const uint32_t level = energy < base ? 0 : least((energy - base) / step, highest);
        const int32_t direction = 640 * (2 * (left_of[row] + above[row]) - corner[row]);
        uint32_t context = directions == 0 ? 3 * level + (left_of[row] != 0) + (above[row] != 0) : directions * level;
        for (uint32_t i = 0; i + 1 < directions; ++i) context += borders[i] < direction;
        near[row] = (int16_t)context;
    }
}

static void decode_column(Pass *pass, uint32_t column, uint8_t *data) {
    const Pass p = *pass; /* a copy, which no byte that is written can change */
    Cursor in = p.in;
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
            code = p.shift == 0 ? symbol : symbol << p.shift | bits(&pass->lower, p.shift);
            code += p.partial && code >= p.zero;
            require(&in, code < p.alphabet);
        }
        at[0] = (uint8_t)code; /* codes are kept in the first two bytes of their elements */
        if (p.size > 1) at[1] = (uint8_t)(code >> 8);
    }
    pass->in = in;
}

static void decode_pass(Pass *p, uint8_t *data, Arena *memory) {
    const uint64_t rows = (p->rows + 7) & ~7u, columns = 1 + least(p->height, 3) * (uint64_t)p->width;
    const uint64_t mark = memory->used;
    const uint32_t contexts = p->energies * (p->directions == 0 ? 3 : p->directions), cells = contexts * p->symbols;
    p->counts = reserve(memory, 4ull * cells), p->cumulative = reserve(memory, 2ull * (cells + contexts));
    p->totals = reserve(memory, 4ull * contexts), p->made_of = reserve(memory, 4ull * contexts);
    p->row_sums = reserve(memory, 4 * rows), p->context_of = reserve(memory, 2 * rows);
    p->levels = reserve(memory, 2 * rows * columns);
    if (data != NULL) memset(memory->base + mark, 0, (size_t)(memory->used - mark));
    memory->used = mark;
    for (uint32_t i = 0; data != NULL && i < cells; ++i) p->counts[i] = 2, p->totals[i / p->symbols] += 2;
    for (uint32_t column = 0; data != NULL && column < p->columns && !p->in.damaged; ++column) {
        for (uint32_t context = 0; context < contexts; ++context) refresh(p, context);
        find_contexts(p, column);
        decode_column(p, column, data);
    }
}

static void read_pass(Cursor *in, Pass *p) {
    const uint32_t kind = number(in, 1);
    p->weighting = kind >> 4, p->directions = kind & 15, p->energies = number(in, 1);
    p->mean = varint(in, 64 * 256), p->base = varint(in, 1 << 16), p->step = varint(in, 1 << 16);
    require(in, p->weighting < 3 && p->energies >= 1 && p->energies <= 64 && p->mean > 0 && p->step > 0);
}

/* Reads the plan of the passes; 0 where it is damaged. */
static uint32_t read_plan(Cursor *in, uint32_t alphabet, Pass *mask, Pass *p) {
    const uint32_t flags = number(in, 1), masked = flags & 1;
    p->height = varint(in, p->columns), p->width = varint(in, p->columns), p->zero = varint(in, alphabet - 1);
    const uint64_t plane = (uint64_t)p->height * p->width;
    require(in, flags < 16 && p->columns <= 1u << 20 && p->rows <= 1u << 28 && alphabet > masked);
    if (!require(in, plane > 0 && p->columns % plane == 0)) return 0;
    *mask = *p, mask->zero = 0, mask->alphabet = mask->symbols = 2;
    if (masked) read_pass(in, mask), require(in, mask->directions == 0);
    read_pass(in, p), require(in, p->directions % 2 == 1 && p->directions < 8);
    p->alphabet = alphabet, p->partial = masked, p->shift = flags >> 1;
    p->symbols = ((alphabet - masked - 1) >> p->shift) + 1;
    const uint32_t exponent = number(in, 1);
    return require(in, p->symbols <= 256 && exponent <= 10) ? p->lanes = mask->lanes = 1u << exponent : 0;
}

static int decode_context(const EdgeTensor *tensor, Cursor in, uint8_t *data, Arena *memory) {
    const uint32_t size = tensor->element_size;
    const Codebook book = codebook_head(&in, tensor, size == 1 ? 256 : 4096);
    const uint8_t *values = book.form == CONSECUTIVE ? codebook_values(&in, tensor, book, memory) : NULL;
    if (!require(&in, tensor->dimensions >= 2 && tensor->elements > 0)) return 1;
    const uint64_t steps = 6 * (uint64_t)left(&in); /* a small file must not ask for much work */
    Pass p = {.rows = tensor->shape[0], .columns = tensor->elements / tensor->shape[0], .size = size}, mask;
    if (read_plan(&in, book.size, &mask, &p) == 0) return 1;
    require(&in, (uint64_t)p.columns * ((p.rows - 1) / p.lanes + 1) * (1 + p.partial) <= steps);
    const uint32_t riders = book.form == CONSECUTIVE ? 0 : book.size * (book.form == AS_HALF ? 2 : size);
    const uint32_t carried = least(riders, 2 * p.lanes);
    const uint8_t *plain = take(&in, riders - carried);
    Cursor lower = part(&in, p.shift > 0 ? varint(&in, tensor->elements) : 0), from;
    Bits states = {&in, 0, 0};
    p.lower.in = &lower;
    p.states = mask.states = reserve(memory, 4 * (uint64_t)p.lanes);
    for (uint32_t i = 0; i < p.lanes; ++i) {
        const uint32_t below = 16 + bits(&states, 4), rest = bits(&states, below);
        if (p.states != NULL) p.states[i] = 1u << below | rest;
    }
    p.in = mask.in = in;
    if (p.partial) decode_pass(&mask, data, memory), p.in = mask.in;
    decode_pass(&p, data, memory);
    uint8_t *ridden = reserve(memory, riders);
    if (data == NULL) reserve(memory, (uint64_t)book.size * size);
    if (data == NULL || !require(&p.in, left(&p.in) == 0 && left(&lower) == 0 && !lower.damaged)) return p.in.damaged;
    for (uint32_t i = 0; i < p.lanes; ++i) require(&p.in, p.states[i] - LOW <= 0xFFFF);
    for (uint32_t i = 0; i < carried; ++i) ridden[i] = (uint8_t)((p.states[i / 2] - LOW) >> 8 * (i % 2));
    if (riders > carried) memcpy(ridden + carried, plain, riders - carried);
    from = (Cursor){ridden, ridden + riders, p.in.damaged};
    if (values == NULL) values = codebook_values(&from, tensor, book, memory);
    for (size_t i = 0; !from.damaged && i < tensor->data_size; i += size)
        copy(data + i, values + (size > 1 ? data[i] | (size_t)data[i + 1] << 8 : data[i]) * size, size);
    return from.damaged;
}

static int decode(const EdgeTensor *tensor, uint8_t *data, Arena *memory) {
    Cursor in = {tensor->payload, tensor->payload + tensor->payload_size, 0};
    const uint32_t size = tensor->element_size, raw = tensor->codec == EDGE_RAW;
    switch (tensor->codec) {
    case EDGE_HALF:
        require(&in, tensor->dtype == EDGE_FLOAT32 && left(&in) == 2 * (size_t)tensor->elements);
        if (data != NULL) expand_halves(&in, tensor->elements, data);
        return in.damaged;
    case EDGE_PLANES: return decode_planes(tensor, in, data, memory);
    case EDGE_DENSE: case EDGE_BLOCKS: return decode_dense(tensor, in, data, memory);
    case EDGE_SPARSE: return decode_sparse(tensor, in, data, memory);
    case EDGE_CONTEXT: return decode_context(tensor, in, data, memory);
    default:
        require(&in, left(&in) == (raw ? tensor->data_size : size));
        for (size_t i = 0; data != NULL && !in.damaged && i < tensor->data_size; i += size)
            copy(data + i, in.at + (raw ? i : 0), size);
        return in.damaged;
    }
}

static uint32_t crc32(const uint8_t *data, size_t size) {
    static const uint32_t TABLE[16] = {0, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158,
        0x5005713C, 0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < 2 * size; ++i) crc = crc >> 4 ^ TABLE[(crc ^ data[i / 2] >> i % 2 * 4) & 15];
    return ~crc;
}

EdgeStatus edge_open(const uint8_t *file, size_t size, EdgeFile *out) {
    Cursor in = {file, file + size, 0}, tensors = {NULL, NULL, 0};
    const uint8_t *magic = take(&in, 4);
    if (magic == NULL || memcmp(magic, "EDGE", 4) != 0) return EDGE_NO_EDGE;
    const uint32_t version = number(&in, 1), count = number(&in, 1);
    if (!in.damaged && version != 2) return EDGE_VERSION;
    const uint8_t *entry = take(&in, 9 * (uint64_t)count);
    uint32_t checksum = number(&in, 4);
    if (in.damaged) return EDGE_DAMAGED;
    if (crc32(file, 6 + 9 * (size_t)count) != checksum) return EDGE_CHECKSUM;
    uint8_t seen[256] = {0};
    for (uint32_t i = 0; i < count; ++i, entry += 9) {
        const Cursor section = part(&in, little(entry + 1, 4));
        require(&in, !seen[*entry]++);
        if (*entry == 3) tensors = section, checksum = (uint32_t)little(entry + 5, 4);
    }
    if (!require(&in, left(&in) == 0 && seen[3])) return EDGE_DAMAGED;
    *out = (EdgeFile){tensors.at, tensors.end};
    return crc32(tensors.at, left(&tensors)) == checksum ? EDGE_OK : EDGE_CHECKSUM;
}

EdgeStatus edge_next(EdgeFile *file, EdgeTensor *out) {
    static const uint8_t SIZES[17] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};
    Cursor in = {file->next, file->end, 0}, payload;
    Arena memory = {NULL, 0, 0};
    if (left(&in) == 0) return EDGE_END;
    const uint32_t dtype = number(&in, 1), dimensions = varint(&in, EDGE_MAX_DIMENSIONS);
    *out = (EdgeTensor){.dtype = (EdgeDtype)dtype, .dimensions = dimensions, .elements = 1};
    uint64_t bound = out->element_size = dtype < sizeof SIZES ? SIZES[dtype] : 0;
    require(&in, bound > 0);
    for (uint32_t i = 0; i < dimensions && !in.damaged; ++i) { /* other readers refuse large sizes beside a zero too */
        out->shape[i] = varint(&in, MAX_BYTES);
        bound *= out->shape[i] > 0 ? out->shape[i] : 1;
        if (require(&in, bound <= MAX_BYTES)) out->elements *= out->shape[i];
    }
    const uint32_t codec = number(&in, 1);
    require(&in, codec <= EDGE_CONTEXT);
    payload = part(&in, varint(&in, MAX_BYTES));
    out->codec = (EdgeCodec)codec;
    out->payload = payload.at, out->payload_size = left(&payload);
    out->data_size = (size_t)out->elements * out->element_size;
    if (in.damaged || decode(out, NULL, &memory)) return EDGE_DAMAGED;
    if (memory.peak > SIZE_MAX - 7) return EDGE_NO_MEMORY;
    out->workspace_size = memory.peak == 0 ? 0 : (size_t)memory.peak + 7;
    file->next = in.at;
    return EDGE_OK;
}

EdgeStatus edge_decode(const EdgeTensor *tensor, void *data, size_t data_size, void *workspace, size_t workspace_size) {
    if (data_size < tensor->data_size || workspace_size < tensor->workspace_size) return EDGE_NO_MEMORY;
    Arena memory = {workspace, 0, 0};
    if (memory.base != NULL) memory.base += (8 - (uintptr_t)memory.base % 8) % 8;
    return decode(tensor, data, &memory) ? EDGE_DAMAGED : EDGE_OK;
}

const char *edge_status_text(EdgeStatus status) {
    static const char *const TEXTS[] = {"fine", "no tensor is left", "this is no .edge file",
        "the file is of another version", "the file does not match its checksum", "the file is damaged",
        "the memory given is smaller than the tensor says"};
    return (size_t)status < sizeof TEXTS / sizeof *TEXTS ? TEXTS[status] : "unknown status";
}
