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
constexpr int HEAD = 32;          // channels of an attention head, in every timm Swin
constexpr long TILE = 98;         // rows that a thread works on: two windows of 49, seven times TALL

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

float sum(Floats value) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += value[lane];
    return total;
}

float largest(Floats value) {
    float most = value[0];
    for (int lane = 1; lane < LANES; ++lane) most = value[lane] > most ? value[lane] : most;
    return most;
}

// e^x to about 2e-7; 0 below -87. NaN stays NaN.
Floats exponential(Floats x) {
    x = x < -87.5f ? Floats{} - 87.5f : x;
    x = x > 88.0f ? Floats{} + 88.0f : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    Floats whole = shifted - 12582912.0f;
    Floats rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    Floats power = rest * 1.98756912e-4f + 1.39819994e-3f;
    power = power * rest + 8.33345205e-3f;
    power = power * rest + 4.16657962e-2f;
    power = power * rest + 1.66666657e-1f;
    power = power * rest + 5.00000000e-1f;
    power = power * rest * rest + rest + 1.0f;
    Floats scaled = (Floats)((Ints)power + (((Ints)shifted - 0x4b400000) << 23));
    return x > -87.4f ? scaled : x == x ? Floats{} : x;
}

// The exact GELU; the error function after Abramowitz and Stegun 7.1.26, to 1.5e-7.
Floats gelu(Floats x) {
    Floats z = x * 0.70710678f;
    Floats positive = z < 0.0f ? -z : z;
    Floats t = 1.0f / (1.0f + 0.3275911f * positive);
    Floats series = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    Floats tail = series * exponential(-z * z);  // 1 - erf(|z|)
    return 0.5f * x * (z < 0.0f ? tail : 2.0f - tail);
}

// -- matrix products ----------------------------------------------------------------------------------------------

// Rows of `a` (TALLNESS, depth) times a panel of packed columns; `end(row, left, right)` gets the sums. In bfloat16
// `depth` is even, and a panel holds pairs: (depth / 2, PANEL, 2).
template <int TALLNESS, class End>
inline __attribute__((always_inline)) void product(long depth, const float* a, long stride, const float* panel, End&& end) {
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
    for (int i = 0; i < TALLNESS; ++i) end(i, left[i], right[i]);
}

template <int TALLNESS, class End>
inline __attribute__((always_inline)) void product(long depth, const BFloat* a, long stride, const BFloat* panel, End&& end) {
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
    for (int i = 0; i < TALLNESS; ++i) end(i, left[i], right[i]);
}

// a (rows, depth), with `stride` from row to row, times packed panels of `columns` in all; `end(row, column, left,
// right)` gets PANEL sums from that column on.
template <class Real, class End>
void multiply(long rows, long depth, long columns, const Real* a, long stride, const Real* panels, End&& end) {
    for (long column = 0; column < columns; column += PANEL, panels += depth * PANEL) {
        long row = 0;
        auto strip = [&](auto tallness) {
            constexpr int TALLNESS = decltype(tallness)::value;
            for (; row + TALLNESS <= rows; row += TALLNESS)
                product<TALLNESS>(depth, a + row * stride, stride, panels,
                                  [&](int i, Floats left, Floats right) { end(row + i, column, left, right); });
        };
        strip(std::integral_constant<int, TALL>());
        strip(std::integral_constant<int, 4>());
        strip(std::integral_constant<int, 1>());
    }
}

// Columns from `source` (columns, depth), their elements `stride` apart along depth, into one panel; absent ones are 0.
template <class Element>
void pack_panel(const Element* source, long between, long columns, long depth, Element* panel) {
    for (long k = 0; k < depth; ++k, panel += PANEL)
        for (long j = 0; j < PANEL; ++j) panel[j] = j < columns ? source[j * between + k] : Element{};
}

// Weights (columns, depth) into panels; in bfloat16 pairs along depth stay together.
template <class Real>
void pack(const void* weights, long columns, long depth, Real* panels) {
    using Element = std::conditional_t<sizeof(Real) == 4, float, uint32_t>;
    const long steps = depth * sizeof(Real) / sizeof(Element);
#pragma omp for schedule(static)
    for (long column = 0; column < columns; column += PANEL)
        pack_panel(static_cast<const Element*>(weights) + column * steps, steps, PANEL, steps,
                   reinterpret_cast<Element*>(panels) + column * steps);
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

// Scratch space of one thread.
template <class Real>
struct Scratch {
    Real *entered, *wide, *keys, *values, *shares;
    float *scores, *left;
    int64_t *place, *position;

    static long padded(long area) { return (area + PANEL - 1) / PANEL * PANEL; }

    static long bytes(const Call& call) {
        Scratch<Real> none;
        return none.lay_out(call, nullptr) - static_cast<char*>(nullptr);
    }

    char* lay_out(const Call& call, char* at) {
        const long tile = std::max<long>(TILE, call.area), wide_columns = std::max(3 * call.channels, call.hidden);
        auto take = [&at](auto*& pointer, long count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
            at += (count * sizeof(*pointer) + 63) / 64 * 64;
        };
        take(entered, tile * call.channels);
        take(wide, tile * wide_columns);
        take(keys, HEAD * padded(call.area));
        take(values, HEAD * padded(call.area));
        take(shares, call.area * padded(call.area));
        take(scores, call.area * padded(call.area));
        take(left, tile * call.channels);
        take(place, tile);
        take(position, tile);
        return at;
    }
};

// Queries divided by their norms and multiplied by the head's scale, keys divided by theirs: row (3, heads, HEAD).
template <class Real>
void to_cosines(Real* row, const Call& call) {
    for (long head = 0; head < 2 * call.heads; ++head) {
        Floats squares = {};
        Real* vector = row + head * HEAD;
        for (int d = 0; d < HEAD; d += LANES) squares += load(vector + d) * load(vector + d);
        float factor = 1.0f / std::max(std::sqrt(sum(squares)), 1e-12f);
        if (head < call.heads) factor *= call.cosine[head];
        for (int d = 0; d < HEAD; d += LANES) store(vector + d, load(vector + d) * factor);
    }
}

// One head of one window: queries of the `count` true tokens from `qkv` on, keys and values of all, into `out`.
template <class Real>
void attend(const Call& call, Scratch<Real>& own, const Real* qkv, const Real* of_padding, long count,
            const int64_t* position, long head, const Real* bias, Real* out) {
    const long area = call.area, channels = call.channels, width = Scratch<Real>::padded(area);
    constexpr long PAIR = 4 / sizeof(Real);  // elements along the depth that stay together
    for (long token = 0, next = 0; token < width; ++token) {
        const Real* source = nullptr;
        if (token < area) {
            const bool is_true = next < count && position[next] == token;
            source = (is_true ? qkv + next * 3 * channels : of_padding) + head * HEAD;
            next += is_true;
        }
        Real* key = own.keys + token / PANEL * PANEL * HEAD + token % PANEL * PAIR;
        for (long d = 0; d < HEAD; ++d)
            key[d / PAIR * PANEL * PAIR + d % PAIR] = source ? source[channels + d] : Real{};
        for (long d = 0; d < HEAD; ++d)
            own.values[d / PANEL * PANEL * width + token / PAIR * PANEL * PAIR + d % PANEL * PAIR + token % PAIR] =
                source ? source[2 * channels + d] : Real{};
    }
    multiply(count, HEAD, width, qkv + head * HEAD, 3 * channels, own.keys,
             [&](long row, long column, Floats left, Floats right) {
                 store(own.scores + row * width + column, left);
                 store(own.scores + row * width + column + LANES, right);
             });
    for (long row = 0; row < count; ++row) {
        float* score = own.scores + row * width;
        const Real* table = bias + position[row] * area;
        long column = 0;
        Floats most = Floats{} - INFINITY;
        for (; column + LANES <= area; column += LANES) {
            Floats value = load(score + column) * call.scale + load(table + column);
            store(score + column, value);
            most = value > most ? value : most;
        }
        if (column < area) {
            Real rest[LANES] = {};
            std::memcpy(rest, table + column, (area - column) * sizeof(Real));
            Floats value = load(score + column) * call.scale + load(rest);
            for (long lane = area - column; lane < LANES; ++lane) value[lane] = -INFINITY;
            store(score + column, value);
            most = value > most ? value : most;
            column += LANES;
        }
        const float top = largest(most);
        Floats total = {};
        for (long c = 0; c < column; c += LANES) {
            Floats share = exponential(load(score + c) - top);
            store(score + c, share);
            total += share;
        }
        const float factor = 1.0f / sum(total);
        for (long c = 0; c < width; c += LANES)
            store(own.shares + row * width + c, c < column ? load(score + c) * factor : Floats{});
    }
    multiply(count, width, HEAD, own.shares, width, own.values, [&](long row, long column, Floats left, Floats right) {
        store(out + row * channels + head * HEAD + column, left);
        store(out + row * channels + head * HEAD + column + LANES, right);
    });
}

// Rows `place` of the map plus what `layer` makes of `from`: at once, or normalised first.
template <class Real>
void add_to_map(const Call& call, Scratch<Real>& own, long count, long depth, const Real* from, const Real* panels,
                const Affine& layer, const Norm& norm) {
    const long channels = call.channels;
    Real* tokens = static_cast<Real*>(call.tokens);
    multiply(count, depth, channels, from, depth, panels, [&](long row, long column, Floats left, Floats right) {
        left += bias_at<Real>(layer, column);
        right += bias_at<Real>(layer, column + LANES);
        if (call.norm_first) {
            Real* to = tokens + own.place[row] * channels + column;
            store(to, load(to) + left);
            store(to + LANES, load(to + LANES) + right);
        } else {
            store(own.left + row * channels + column, left);
            store(own.left + row * channels + column + LANES, right);
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
        Real* to = own.entered + row * channels;
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
    multiply(count, channels, 3 * channels, own.entered, channels, qkv_panels,
             [&](long row, long column, Floats left, Floats right) {
                 Real* to = own.wide + row * 3 * channels + column;
                 store(to, left + bias_at<Real>(call.qkv, column));
                 store(to + LANES, right + bias_at<Real>(call.qkv, column + LANES));
             });
    for (long row = 0; row < count && call.cosine; ++row) to_cosines(own.wide + row * 3 * channels, call);
    for (long window = first, start = 0; window < last; ++window) {
        long end = start;
        for (long slot = window * area; slot < (window + 1) * area; ++slot) end += call.rows[slot] < call.num_tokens;
        const Real* bias = static_cast<const Real*>(call.bias);
        if (call.classes) bias += call.classes[window] * call.heads * area * area;
        for (long head = 0; head < call.heads; ++head)
            attend(call, own, own.wide + start * 3 * channels, of_padding, end - start, own.position + start, head,
                   bias + head * area * area, own.entered + start * channels);
        start = end;
    }
    add_to_map(call, own, count, channels, own.entered, proj_panels, call.proj, call.norm1);
}

template <class Real>
void mlp_pass(const Call& call, Scratch<Real>& own, const Real* panels1, const Real* panels2, const int64_t* rows,
              long count) {
    const long channels = call.channels, hidden = call.hidden;
    std::copy(rows, rows + count, own.place);
    enter(call, own, count, call.norm2);
    multiply(count, channels, hidden, own.entered, channels, panels1,
             [&](long row, long column, Floats left, Floats right) {
                 Real* to = own.wide + row * hidden + column;
                 store(to, gelu(left + bias_at<Real>(call.fc1, column)));
                 store(to + LANES, gelu(right + bias_at<Real>(call.fc1, column + LANES)));
             });
    add_to_map(call, own, count, hidden, own.wide, panels2, call.fc2, call.norm2);
}

long rounded_up(long value, long step) { return (value + step - 1) / step * step; }

// What all threads share, laid out at the start of the workspace.
template <class Real>
struct Shared {
    Real *qkv, *proj, *fc1, *fc2, *of_padding;
    int64_t* rows;

    char* lay_out(const Call& call, char* at) {
        const long channels = call.channels;
        auto take = [&at](auto*& pointer, long count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
            at += rounded_up(count * sizeof(*pointer), 64);
        };
        take(qkv, 3 * channels * channels);
        take(proj, channels * channels);
        take(fc1, call.hidden * channels);
        take(fc2, call.hidden * channels);
        take(of_padding, 3 * channels);
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
    const long row_tiles = rounded_up((count + TILE - 1) / TILE, threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<Real> own;
#ifdef _OPENMP
        own.lay_out(call, scratch + omp_get_thread_num() * each);
#else
        own.lay_out(call, scratch);
#endif
        pack(call.qkv.weight, 3 * channels, channels, shared.qkv);
        pack(call.proj.weight, channels, channels, shared.proj);
        pack(call.fc1.weight, call.hidden, channels, shared.fc1);
        pack(call.fc2.weight, channels, call.hidden, shared.fc2);
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < window_tiles; ++tile)
            attention_pass(call, own, shared.qkv, shared.proj, shared.of_padding, call.num_windows * tile / window_tiles,
                           call.num_windows * (tile + 1) / window_tiles);
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < row_tiles; ++tile) {
            const long first = count * tile / row_tiles, last = count * (tile + 1) / row_tiles;
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
int has_bfloat() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
}
