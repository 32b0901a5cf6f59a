// A Swin block on some of its windows, in place, on a CPU; `native.py` compiles and calls it, `windowed.py` says what
// it computes. Tensors are contiguous, of float or bfloat16 ("Real"); sums are kept in float.
//
// Two passes over the rows of the map: attention, a few windows at a time, and the MLP, some tokens at a time. What a
// thread holds meanwhile stays in its second-level cache. Weights are packed into panels once per call.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, TALL = 14;  // 28 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int LANES = 8, TALL = 6;
#else
constexpr int LANES = 4, TALL = 6;
#endif
constexpr int PANEL = 2 * LANES;  // columns of a panel of packed weights
constexpr int HEAD = 32;          // most channels of an attention head; the number in every timm Swin
constexpr long TILE = 98;         // rows that a thread works on: two windows of 49
constexpr long SLACK = 32;        // elements after a row that may be read and written

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
struct BFloat {
    uint16_t bits;
};

struct Norm {
    const void *weight, *bias;
    float eps;
};
struct Affine {
    const void *weight, *bias;  // (out, in), (out) or null
};
struct Call {  // the same fields in native.py
    void* tokens;            // (num_tokens, channels)
    const int64_t* rows;     // (num_windows, area), num_tokens for padding
    const void* bias;        // (classes, heads, area, area)
    const int64_t* classes;  // (num_windows), or null
    const float* cosine;     // (heads), or null: queries and keys as they are
    void* workspace;
    int64_t num_tokens, num_windows, area, channels, heads, hidden, norm_first, threads;
    float scale;
    Norm norm1, norm2;
    Affine qkv, proj, fc1, fc2;
};

namespace {

long rounded_up(long value, long step) { return (value + step - 1) / step * step; }

// -- vectors ------------------------------------------------------------------------------------------------------

Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

Floats load(const BFloat* from) {
    Shorts bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Ints) << 16);
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

void store(BFloat* to, Floats value) {  // rounded to nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
#else
    Ints bits = (Ints)value;
    Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = value == value ? rounded : Ints{} + 0x7fc0;
    Shorts narrow = __builtin_convertvector(rounded, Shorts);
#endif
    std::memcpy(to, &narrow, sizeof narrow);
}

// Squares of `step` lanes change places: those of `upper` that have the bit `step` with those of `lower` that do not.
template <class Vector>
void exchange(Vector& upper, Vector& lower, int step) {
    Ints first, second;
    for (int lane = 0; lane < LANES; ++lane) {
        first[lane] = lane & step ? LANES + lane - step : lane;
        second[lane] = lane & step ? LANES + lane : lane + step;
    }
    const Vector above = upper;
    upper = __builtin_shuffle(above, lower, first);
    lower = __builtin_shuffle(above, lower, second);
}

// Lane i of the result is all of rows[i] together; `rows` (LANES) is used up.
template <class Both>
Floats reduced(Floats* rows, Both&& both) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i += 2 * step) {
            exchange(rows[i], rows[i + step], step);
            rows[i] = both(rows[i], rows[i + step]);
        }
    }
    return rows[0];
}

float widened(float value) { return value; }
float widened(BFloat value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class Real>
Real narrowed(float value) {
    Real lanes[LANES];
    store(lanes, Floats{} + value);
    return lanes[0];
}

float sum(Floats value) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        Floats other = value;
        exchange(value, other, step);
        value += other;
    }
    return value[0];
}

// e^x for x up to 0, to about 2e-7; what is below -87 counts as -87, and NaN stays NaN.
Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    Floats whole = shifted - 12582912.0f;
    Floats rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    Floats power = rest * 1.98756912e-4f + 1.39819994e-3f;
    power = power * rest + 8.33345205e-3f;
    power = power * rest + 4.16657962e-2f;
    power = power * rest + 1.66666657e-1f;
    power = power * rest + 5.00000000e-1f;
    power = power * rest * rest + rest + 1.0f;
    Floats scaled = (Floats)((Ints)power + ((Ints)shifted << 23));
    return x == x ? scaled : x;
}

// The exact GELU; erf(x / sqrt 2) is a rational function fitted to 2e-8 up to 5.6, where it is 1.
Floats gelu(Floats x) {
    Floats z = x < -5.6f ? Floats{} - 5.6f : x;
    z = z > 5.6f ? Floats{} + 5.6f : z;
    const Floats u = z * z;
    Floats over = ((((4.429059683e-08f * u + 1.271299753e-05f) * u + 3.476981682e-04f) * u + 9.414499188e-03f) * u +
                   6.875193743e-02f) * u + 7.978844432e-01f;
    Floats under = ((((1.180209031e-06f * u + 7.510127261e-05f) * u + 1.912969209e-03f) * u + 2.894000493e-02f) * u +
                    2.528334885e-01f) * u + 1.0f;
    Floats erf = z * over / under;
    erf = erf < -1.0f ? Floats{} - 1.0f : erf;  // rounding may have gone past it
    const Floats half = 0.5f * x;
    return half + half * erf;
}

// -- matrix products ----------------------------------------------------------------------------------------------

// Rows of `a` (TALLNESS, depth) times a panel of packed columns: PANEL sums for each row, `apart` from row to row. In
// bfloat16 `depth` is even, and a panel holds pairs: (depth / 2, PANEL, 2).
template <int TALLNESS>
__attribute__((noinline)) void product(long depth, const float* a, long stride, const float* panel, float* sums,
                                       long apart) {
    Floats left[TALLNESS] = {}, right[TALLNESS] = {};
    const float* base[(TALLNESS + 2) / 3];
    for (int i = 0; i < (TALLNESS + 2) / 3; ++i) base[i] = a + 3 * i * stride;
    for (long k = 0, step[3] = {0, stride, 2 * stride}; k < depth; ++k, ++step[0], ++step[1], ++step[2]) {
        Floats b0 = load(panel), b1 = load(panel + LANES);
        panel += PANEL;
#pragma GCC unroll 16
        for (int i = 0; i < TALLNESS; ++i) {
            float factor = base[i / 3][step[i % 3]];
            left[i] += factor * b0;
            right[i] += factor * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TALLNESS; ++i) {
        store(sums + i * apart, left[i]);
        store(sums + i * apart + LANES, right[i]);
    }
}

template <int TALLNESS>
__attribute__((noinline)) void product(long depth, const BFloat* a, long stride, const BFloat* panel, float* sums,
                                       long apart) {
    Floats left[TALLNESS] = {}, right[TALLNESS] = {};
#ifdef __AVX512BF16__
    const BFloat* base[(TALLNESS + 2) / 3];
    for (int i = 0; i < (TALLNESS + 2) / 3; ++i) base[i] = a + 3 * i * stride;
    for (long k = 0, step[3] = {0, stride, 2 * stride}; k < depth; k += 2, step[0] += 2, step[1] += 2, step[2] += 2) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel), b1 = (__m512bh)_mm512_loadu_si512(panel + PANEL);
        panel += 2 * PANEL;
#pragma GCC unroll 16
        for (int i = 0; i < TALLNESS; ++i) {
            int32_t pair;
            std::memcpy(&pair, base[i / 3] + step[i % 3], sizeof pair);
            __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
            left[i] = (Floats)_mm512_dpbf16_ps((__m512)left[i], factor, b0);
            right[i] = (Floats)_mm512_dpbf16_ps((__m512)right[i], factor, b1);
        }
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < TALLNESS; ++i) {
        store(sums + i * apart, left[i]);
        store(sums + i * apart + LANES, right[i]);
    }
}

// Calls `strip` for all of `rows`, as many at a time as fit the registers: strip(first, how many as a constant).
template <class Strip>
void in_strips(long rows, Strip&& strip) {
    long row = 0;
    for (; row + TALL <= rows; row += TALL) strip(row, std::integral_constant<int, TALL>());
    for (; row + TALL / 2 <= rows; row += TALL / 2) strip(row, std::integral_constant<int, TALL / 2>());
    for (; row + 2 <= rows; row += 2) strip(row, std::integral_constant<int, 2>());
    for (; row < rows; ++row) strip(row, std::integral_constant<int, 1>());
}

// a (rows, depth), with `stride` from row to row, times packed panels of `columns` in all (a multiple of LANES), each
// `panel_depth` deep; `end(row, column, sums)` gets LANES sums from that column on.
template <class Real, class End>
void multiply(long rows, long depth, long columns, const Real* a, long stride, const Real* panels, long panel_depth,
              End&& end) {
    alignas(64) float sums[TALL * PANEL];
    for (long column = 0; column < columns; column += PANEL, panels += panel_depth * PANEL)
        in_strips(rows, [&](long row, auto tallness) {
            product<tallness>(depth, a + row * stride, stride, panels, sums, PANEL);
            for (int i = 0; i < tallness; ++i) end(row + i, column, load(sums + i * PANEL));
            if (column + LANES < columns)
                for (int i = 0; i < tallness; ++i) end(row + i, column + LANES, load(sums + i * PANEL + LANES));
        });
}

// The same into `sums` (rows, columns), of whole panels.
template <class Real>
void multiply(long rows, long depth, long columns, const Real* a, long stride, const Real* panels, long panel_depth,
              float* sums) {
    for (long column = 0; column < columns; column += PANEL, panels += panel_depth * PANEL)
        in_strips(rows, [&](long row, auto tallness) {
            product<tallness>(depth, a + row * stride, stride, panels, sums + row * columns + column, columns);
        });
}

// LANES rows of LANES words each, `sources[i]` onwards, into a square of a panel: word k of row j to panel[k][j].
void transpose(const int32_t* const sources[LANES], int32_t* panel) {
    Ints rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) std::memcpy(&rows[i], sources[i], sizeof rows[i]);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (!(i & step)) exchange(rows[i], rows[i + step], step);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) std::memcpy(panel + i * PANEL, &rows[i], sizeof rows[i]);
}

// Weights (columns, depth) into panels; in bfloat16 pairs along depth stay together, as one word. All threads share
// the work.
template <class Real>
void pack(const void* weights, long columns, long depth, Real* panels) {
    const long words = depth * sizeof(Real) / 4;
    const int32_t* from = static_cast<const int32_t*>(weights);
    int32_t* to = reinterpret_cast<int32_t*>(panels);
#pragma omp for schedule(static)
    for (long column = 0; column < columns; column += LANES)
        for (long word = 0; word < words; word += LANES) {
            const int32_t* sources[LANES];
            for (int j = 0; j < LANES; ++j) sources[j] = from + (column + j) * words + word;
            transpose(sources, to + column / PANEL * PANEL * words + word * PANEL + column % PANEL);
        }
}

// -- steps of a block ---------------------------------------------------------------------------------------------

// LayerNorm of one row of `channels` in float.
template <class Real, class From, class End>
void normalise(const From* row, long channels, const Norm& norm, End&& end) {
    Floats total = {}, squares = {};
    for (long c = 0; c < channels; c += LANES) total += load(row + c);
    const float mean = sum(total) / channels;
    for (long c = 0; c < channels; c += LANES) {
        Floats centred = load(row + c) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / channels + norm.eps);
    const Real *weight = static_cast<const Real*>(norm.weight), *bias = static_cast<const Real*>(norm.bias);
    for (long c = 0; c < channels; c += LANES)
        end(c, (load(row + c) - mean) * scale * load(weight + c) + load(bias + c));
}

template <class Real>
Floats bias_at(const Affine& layer, long column) {
    return layer.bias ? load(static_cast<const Real*>(layer.bias) + column) : Floats{};
}

// Lays out arrays one after another, each at the start of a cache line.
struct Taker {
    char*& at;

    template <class Element>
    void operator()(Element*& pointer, long count) const {
        pointer = reinterpret_cast<Element*>(at);
        at += rounded_up(count * sizeof(Element), 64);
    }
};

// Scratch space of one thread.
template <class Real>
struct Scratch {
    Real *entered, *wide, *keys, *values, *shares, *zeros;
    float *scores, *left, *factor;
    int64_t *place, *position;
    const Real** tokens;
    long entered_stride, wide_stride;  // not powers of two, whose rows would meet in one set of the cache
    Ints lane;

    static long bytes(const Call& call) {
        Scratch<Real> none;
        return none.lay_out(call, nullptr) - static_cast<char*>(nullptr);
    }

    char* lay_out(const Call& call, char* at) {
        const long tile = std::max(rounded_up(TILE, TALL), call.area), width = rounded_up(call.area, PANEL);
        entered_stride = call.channels + SLACK;
        wide_stride = std::max(3 * call.channels, call.hidden) + SLACK;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        const Taker take{at};
        take(entered, tile * entered_stride);
        take(wide, tile * wide_stride);
        take(keys, HEAD * width);
        take(values, HEAD * width);
        take(shares, call.area * width);
        take(zeros, 3 * call.channels + SLACK);
        take(scores, call.area * width);
        take(left, call.norm_first ? 0 : tile * call.channels);
        take(factor, rounded_up(call.area, LANES));
        take(tokens, width);
        take(place, tile);
        take(position, tile);
        return at;
    }
};

// Queries divided by their norms and multiplied by the head's scale, keys divided by theirs: row (3, heads, head).
template <class Real>
void to_cosines(Real* row, const Call& call) {
    const long width = call.channels / call.heads;
    for (long head = 0; head < 2 * call.heads; ++head, row += width) {
        float vector[HEAD], squares = 0;
        for (long d = 0; d < width; ++d) {
            vector[d] = widened(row[d]);
            squares += vector[d] * vector[d];
        }
        float factor = 1.0f / std::max(std::sqrt(squares), 1e-12f);
        if (head < call.heads) factor *= call.cosine[head];
        for (long d = 0; d < width; ++d) row[d] = narrowed<Real>(vector[d] * factor);
    }
}

// Keys of a head, (HEAD, width) in panels, and its values, (width, HEAD) in panels; `tokens[j] + offset` is the head's
// query of token j, or zeros past the window. Past `head` channels stands something, which nobody reads.
template <class Real>
void pack_keys_and_values(const Real* const* tokens, long area, long width, long offset, long head, long channels,
                          Real* keys, Real* values) {
    constexpr long PAIR = 4 / sizeof(Real), WORDS = HEAD / PAIR;
    for (long token = 0; token < width; token += LANES)
        for (long word = 0; word < head / PAIR; word += LANES) {
            const int32_t* sources[LANES];
            for (int j = 0; j < LANES; ++j)
                sources[j] = reinterpret_cast<const int32_t*>(tokens[token + j] + offset + channels) + word;
            transpose(sources, reinterpret_cast<int32_t*>(keys) + token / PANEL * PANEL * WORDS + word * PANEL +
                                   token % PANEL);
        }
    for (long token = 0; token < rounded_up(area, PAIR); token += PAIR)
        for (long d = 0; d < head; d += LANES) {
            const Real* value = tokens[token] + offset + 2 * channels + d;
            Real* to = values + d / PANEL * PANEL * width + token * PANEL + d % PANEL * PAIR;
            if constexpr (PAIR == 1) {
                store(to, load(value));
            } else {  // the second token of a pair in the upper half of a word
                Shorts even, odd;
                std::memcpy(&even, value, sizeof even);
                std::memcpy(&odd, tokens[token + 1] + offset + 2 * channels + d, sizeof odd);
                Ints both = __builtin_convertvector(even, Ints) | __builtin_convertvector(odd, Ints) << 16;
                std::memcpy(to, &both, sizeof both);
            }
        }
}

// exp(scores * scale + bias - largest) of some rows, at most LANES, into `shares`, and one over their sums into `factor`.
template <class Real>
void softmax(Scratch<Real>& own, long first, long count, long area, long width, float scale, const Real* bias,
             const int64_t* position) {
    Floats rows[LANES] = {};
    const long whole = area / LANES * LANES;
    for (long i = 0; i < count; ++i) {
        float* score = own.scores + (first + i) * width;
        const Real* table = bias + position[first + i] * area;
        Floats most = Floats{} - INFINITY;
        for (long column = 0; column < whole; column += LANES) {
            Floats value = load(score + column) * scale + load(table + column);
            store(score + column, value);
            most = value > most ? value : most;
        }
        if (whole < area) {
            Real rest[LANES] = {};
            for (long column = whole; column < area; ++column) rest[column - whole] = table[column];
            Floats value = load(score + whole) * scale + load(rest);
            value = own.lane < (int32_t)(area - whole) ? value : Floats{} - INFINITY;
            store(score + whole, value);
            most = value > most ? value : most;
        }
        rows[i] = most;
    }
    const Floats top = reduced(rows, [](Floats one, Floats other) { return other > one ? other : one; });
    for (long i = 0; i < count; ++i) {
        const float* score = own.scores + (first + i) * width;
        Real* share = own.shares + (first + i) * width;
        const float most = top[i];
        Floats total = {};
        for (long column = 0; column < area; column += LANES) {
            Floats value = exponential(load(score + column) - most);
            store(share + column, value);
            total += value;
        }
        rows[i] = total;
    }
    const Floats totals = reduced(rows, [](Floats one, Floats other) { return one + other; });
    store(own.factor + first, 1.0f / totals);
}

// One head of one window: queries of its `count` true tokens, one after another, with keys and values of all `tokens`.
// What it writes past its channels of `out` belongs to the next head, which comes later, or to nobody.
template <class Real>
void attend(const Call& call, Scratch<Real>& own, const Real* queries, const Real* const* tokens, long count,
            const int64_t* position, long number, const Real* bias, Real* out) {
    const long area = call.area, channels = call.channels, width = rounded_up(area, PANEL);
    const long head = channels / call.heads, offset = number * head;
    constexpr long PAIR = 4 / sizeof(Real);
    pack_keys_and_values(tokens, area, width, offset, head, channels, own.keys, own.values);
    multiply(count, head, width, queries + offset, own.wide_stride, own.keys, HEAD, own.scores);
    for (long row = 0; row < count; row += LANES)
        softmax(own, row, std::min<long>(LANES, count - row), area, width, call.scale, bias, position);
    multiply(count, rounded_up(area, PAIR), rounded_up(head, LANES), own.shares, width, own.values, width,
             [&](long row, long column, Floats sums) {
                 store(out + row * own.entered_stride + offset + column, sums * own.factor[row]);
             });
}

// Rows `place` of the map plus what `layer` makes of `from`: at once, or normalised first.
template <class Real>
void add_to_map(const Call& call, Scratch<Real>& own, long count, long depth, const Real* from, long stride,
                const Real* panels, const Affine& layer, const Norm& norm) {
    const long channels = call.channels;
    Real* tokens = static_cast<Real*>(call.tokens);
    multiply(count, depth, channels, from, stride, panels, depth, [&](long row, long column, Floats sums) {
        sums += bias_at<Real>(layer, column);
        if (call.norm_first) {
            Real* to = tokens + own.place[row] * channels + column;
            store(to, load(to) + sums);
        } else {
            store(own.left + row * channels + column, sums);
        }
    });
    for (long row = 0; row < count && !call.norm_first; ++row) {
        Real* to = tokens + own.place[row] * channels;
        normalise<Real>(own.left + row * channels, channels, norm,
                        [&](long c, Floats value) { store(to + c, load(to + c) + value); });
    }
}

// Rows `place` of the map, normalised where norms come first, to where a thread reads them in order.
template <class Real>
void enter(const Call& call, Scratch<Real>& own, long count, const Norm& norm) {
    const long channels = call.channels;
    for (long row = 0; row < count; ++row) {
        const Real* from = static_cast<const Real*>(call.tokens) + own.place[row] * channels;
        Real* to = own.entered + row * own.entered_stride;
        if (call.norm_first)
            normalise<Real>(from, channels, norm, [&](long c, Floats value) { store(to + c, value); });
        else
            std::memcpy(to, from, channels * sizeof(Real));
    }
}

// Attention of windows `first` to `last`: into the map.
template <class Real>
void attention_pass(const Call& call, Scratch<Real>& own, const Real* qkv_panels, const Real* proj_panels,
                    const Real* of_padding, long first, long last) {
    const long area = call.area, channels = call.channels;
    long count = 0;
    for (long slot = first * area; slot < last * area; ++slot)
        if (call.rows[slot] < call.num_tokens) {
            own.place[count] = call.rows[slot];
            own.position[count++] = slot % area;
        }
    enter(call, own, count, call.norm1);
    multiply(count, channels, 3 * channels, own.entered, own.entered_stride, qkv_panels, channels,
             [&](long row, long column, Floats sums) {
                 store(own.wide + row * own.wide_stride + column, sums + bias_at<Real>(call.qkv, column));
             });
    for (long row = 0; row < count && call.cosine; ++row) to_cosines(own.wide + row * own.wide_stride, call);
    std::fill(own.tokens + area, own.tokens + rounded_up(area, PANEL), own.zeros);
    for (long window = first, start = 0; window < last; ++window) {
        long end = start;
        for (long token = 0; token < area; ++token) {
            const bool is_true = call.rows[window * area + token] < call.num_tokens;
            own.tokens[token] = is_true ? own.wide + end * own.wide_stride : of_padding;
            end += is_true;
        }
        const Real* bias = static_cast<const Real*>(call.bias);
        if (call.classes) bias += call.classes[window] * call.heads * area * area;
        for (long head = 0; head < call.heads; ++head)
            attend(call, own, own.wide + start * own.wide_stride, own.tokens, end - start, own.position + start, head,
                   bias + head * area * area, own.entered + start * own.entered_stride);
        start = end;
    }
    add_to_map(call, own, count, channels, own.entered, own.entered_stride, proj_panels, call.proj, call.norm1);
}

template <class Real>
void mlp_pass(const Call& call, Scratch<Real>& own, const Real* panels1, const Real* panels2, const int64_t* rows,
              long count) {
    const long channels = call.channels, hidden = call.hidden;
    std::copy(rows, rows + count, own.place);
    enter(call, own, count, call.norm2);
    multiply(count, channels, hidden, own.entered, own.entered_stride, panels1, channels,
             [&](long row, long column, Floats sums) {
                 store(own.wide + row * own.wide_stride + column, gelu(sums + bias_at<Real>(call.fc1, column)));
             });
    add_to_map(call, own, count, hidden, own.wide, own.wide_stride, panels2, call.fc2, call.norm2);
}

// What all threads share, laid out at the start of the workspace.
template <class Real>
struct Shared {
    Real *qkv, *proj, *fc1, *fc2, *of_padding;  // the MLP's weights take the place of attention's
    int64_t* rows;

    char* lay_out(const Call& call, char* at) {
        const long channels = call.channels;
        const Taker take{at};
        const long width = rounded_up(channels, PANEL), wide = rounded_up(3 * channels, PANEL);
        const long hidden = rounded_up(call.hidden, PANEL);
        take(qkv, std::max((wide + width) * channels, hidden * channels + width * call.hidden));
        proj = qkv + wide * channels;
        fc1 = qkv;
        fc2 = qkv + hidden * channels;
        take(of_padding, 3 * channels + SLACK);
        take(rows, call.num_windows * call.area);
        return at;
    }
};

template <class Real>
void run(const Call& call) {
    const long channels = call.channels, threads = call.threads;
    Shared<Real> shared;
    char* scratch = shared.lay_out(call, static_cast<char*>(call.workspace));
    const long each = Scratch<Real>::bytes(call);
    long count = 0;
    for (long slot = 0; slot < call.num_windows * call.area; ++slot)
        if (call.rows[slot] < call.num_tokens) shared.rows[count++] = call.rows[slot];
    for (long c = 0; c < 3 * channels; c += LANES) store(shared.of_padding + c, bias_at<Real>(call.qkv, c));
    if (call.cosine) to_cosines(shared.of_padding, call);
    const long most_windows = std::max<long>(1, TILE / call.area);
    const long window_tiles = rounded_up((call.num_windows + most_windows - 1) / most_windows, threads);
    const long strips = (count + TALL - 1) / TALL, row_tiles = rounded_up((count + TILE - 1) / TILE, threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<Real> own;
#ifdef _OPENMP
        own.lay_out(call, scratch + omp_get_thread_num() * each);
#else
        own.lay_out(call, scratch);
#endif
        std::fill_n(own.zeros, 3 * channels + SLACK, Real{});
        pack(call.qkv.weight, 3 * channels, channels, shared.qkv);
        pack(call.proj.weight, channels, channels, shared.proj);
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < window_tiles; ++tile)
            attention_pass(call, own, shared.qkv, shared.proj, shared.of_padding, call.num_windows * tile / window_tiles,
                           call.num_windows * (tile + 1) / window_tiles);
        pack(call.fc1.weight, call.hidden, channels, shared.fc1);
        pack(call.fc2.weight, channels, call.hidden, shared.fc2);
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < row_tiles; ++tile) {
            const long first = strips * tile / row_tiles * TALL;
            const long last = std::min(count, strips * (tile + 1) / row_tiles * TALL);
            mlp_pass(call, own, shared.fc1, shared.fc2, shared.rows + first, last - first);
        }
    }
}

template <class Real>
int64_t workspace_of(const Call& call) {
    Shared<Real> shared;
    return shared.lay_out(call, nullptr) - static_cast<char*>(nullptr) + call.threads * Scratch<Real>::bytes(call);
}

}  // namespace

extern "C" {
int64_t workspace_bytes(const Call* call, int is_bfloat) {
    return is_bfloat ? workspace_of<BFloat>(*call) : workspace_of<float>(*call);
}
void run_windows(const Call* call, int is_bfloat) { is_bfloat ? run<BFloat>(*call) : run<float>(*call); }
int lanes() { return LANES; }
int has_bfloat() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
}
