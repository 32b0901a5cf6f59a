// A Swin block on some of its windows, in place; `portable.py` has the same in Python. Tensors are contiguous, of float
// or bfloat16 ("Real"); sums are kept in float.
//
// Two passes over the rows of the map: attention, a few windows at a time, and the MLP, some tokens at a time. The
// workspace of a thread stays in its second-level cache.
#pragma once
#include "layers.hpp"

constexpr int HEAD = 32;  // most channels of an attention head; the number in every timm Swin

struct Block {  // the fields of `_Block` in native.py
    void* tokens;            // (num_tokens, channels), changed in place
    const int64_t* rows;     // (num_windows, area), num_tokens for padding
    const void* bias;        // (classes, heads, area, area)
    const int64_t* classes;  // (num_windows), or null
    const float* cosine;     // (heads), or null: queries and keys as they are
    void* workspace;         // as many bytes as `workspace_of` says
    int64_t num_tokens, num_windows, area, channels, heads, hidden, norm_first, threads;
    float scale;  // of the attention scores
    Norm norm1, norm2;
    Affine qkv, proj, fc1, fc2;
};

namespace {

// As `packs_once` of layers.hpp, for the rows of all windows.
bool packs_once(const Block& call) { return packs_once(call.num_windows * call.area, call.threads); }

// Workspace of one thread.
template <class Real>
struct Scratch {
    Real *entered, *wide, *keys, *values, *shares, *zeros, *panel;
    float *scores, *left, *factor;
    int64_t *place, *position;
    const Real** tokens;
    long entered_stride, wide_stride;  // not powers of two, whose rows would meet in one set of the cache
    Ints lane;

    char* lay_out(const Block& call, char* at) {
        const long tile = std::max(Tiles::MOST, (long)call.area), width = rounded_up(call.area, PANEL);
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
        take(panel, packs_once(call) ? 0 : std::max(call.channels, call.hidden) * PANEL);
        take(scores, call.area * width);
        take(left, call.norm_first ? 0 : tile * call.channels);
        take(factor, rounded_up(call.area, LANES));
        take(tokens, width);
        take(place, tile);
        take(position, tile);
        return at;
    }
};

// Cosine attention: queries are divided by their norms and multiplied by the head's scale, keys divided by their norms.
//
// Args: row (3, heads, channels / heads), queries, keys and values of one token; changed in place.
template <class Real>
void to_cosines(Real* row, const Block& call) {
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

// Keys and values of one head of one window, packed into panels.
//
// Args: tokens (width), each pointing to queries, keys and values (3, channels) of one token, or to zeros past `area`;
// offset, the first channel of the head, which has `head` channels; keys (HEAD, width) and values (width, HEAD), written
// in panels. Their places past `head` channels are not defined, and nobody reads them.
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

// Softmax of some rows of scores, without its division: exp(scores * scale + bias - largest) goes to `own.shares`, and
// one over the sum of each row to `own.factor`.
//
// Args: own.scores (.., width), the scores; first, count: the rows, at most LANES; bias (area, area) of the head;
// position (..), the slot of each row in its window. Columns past `area` get a share of about 0.
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

// Attention of one head of one window.
//
// Args: queries (count, ..) with `own.wide_stride` elements from row to row, of the tokens of the window, padding left
// out; tokens, as in `pack_keys_and_values`, padding included; position (count), as in `softmax`; number, of the head;
// bias (area, area) of the head; out (count, channels) with `own.entered_stride`, whose channels of this head are
// written. It writes past them too: over channels of the next head, which comes later, or into slack.
template <class Real>
void attend(const Block& call, Scratch<Real>& own, const Real* queries, const Real* const* tokens, long count,
            const int64_t* position, long number, const Real* bias, Real* out) {
    const long area = call.area, channels = call.channels, width = rounded_up(area, PANEL);
    const long head = channels / call.heads, offset = number * head;
    constexpr long PAIR = 4 / sizeof(Real);
    pack_keys_and_values(tokens, area, width, offset, head, channels, own.keys, own.values);
    multiply_into(own.scores, count, head, width, queries + offset, own.wide_stride,
                  [&](long column) { return own.keys + column * HEAD; });
    for (long row = 0; row < count; row += LANES)
        softmax(own, row, std::min<long>(LANES, count - row), area, width, call.scale, bias, position);
    multiply(
        count, rounded_up(area, PAIR), rounded_up(head, LANES), own.shares, width,
        [&](long column) { return own.values + column * width; },
        [&](long row, long column, Floats sums) {
            store(out + row * own.entered_stride + offset + column, sums * own.factor[row]);
        });
}

// A residual: rows `own.place` of the map += layer(from), or += norm(layer(from)) when norms come after.
//
// Args: from (count, depth) with `stride` elements from row to row.
template <class Real>
void add_to_map(const Block& call, Scratch<Real>& own, long count, const Real* from, long stride,
                const Layer<Real>& layer, const Norm& norm) {
    const long channels = call.channels;
    Real* tokens = static_cast<Real*>(call.tokens);
    layer.apply(count, from, stride, own.panel, [&](long row, long column, Floats sums) {
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

// Gather: rows `own.place` of the map into own.entered (count, channels), normalised when norms come first.
template <class Real>
void enter(const Block& call, Scratch<Real>& own, long count, const Norm& norm) {
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

// Attention of some windows, with its norm and residual, into the map.
//
// Args: qkv and proj, the layers; of_padding (3, channels), queries, keys and values of padding; windows `first` to
// `last` - 1, of at most `Tiles::MOST` tokens unless it is one window.
template <class Real>
void attention_pass(const Block& call, Scratch<Real>& own, const Layer<Real>& qkv, const Layer<Real>& proj,
                    const Real* of_padding, long first, long last) {
    const long area = call.area;
    long count = 0;
    for (long slot = first * area; slot < last * area; ++slot)
        if (call.rows[slot] < call.num_tokens) {
            own.place[count] = call.rows[slot];
            own.position[count++] = slot % area;
        }
    enter(call, own, count, call.norm1);
    qkv.apply(count, own.entered, own.entered_stride, own.panel, [&](long row, long column, Floats sums) {
        store(own.wide + row * own.wide_stride + column, sums);
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
    add_to_map(call, own, count, own.entered, own.entered_stride, proj, call.norm1);
}

// The MLP of some tokens, with its norm and residual, into the map.
//
// Args: fc1 and fc2, the layers; rows (count) of the tokens in the map, at most `Tiles::MOST`.
template <class Real>
void mlp_pass(const Block& call, Scratch<Real>& own, const Layer<Real>& fc1, const Layer<Real>& fc2, const int64_t* rows,
              long count) {
    std::copy(rows, rows + count, own.place);
    enter(call, own, count, call.norm2);
    fc1.apply(count, own.entered, own.entered_stride, own.panel, [&](long row, long column, Floats sums) {
        store(own.wide + row * own.wide_stride + column, gelu(sums));
    });
    add_to_map(call, own, count, own.wide, own.wide_stride, fc2, call.norm2);
}

// What all threads share, at the start of the workspace.
template <class Real>
struct Shared {
    // Panels, when they are packed once; those of the MLP take the place of those of attention.
    Real *qkv = nullptr, *proj = nullptr, *fc1 = nullptr, *fc2 = nullptr;
    Real* of_padding;
    int64_t* rows;

    char* lay_out(const Block& call, char* at) {
        const long channels = call.channels;
        const Taker take{at};
        if (packs_once(call)) {
            const long width = rounded_up(channels, PANEL), wide = rounded_up(3 * channels, PANEL);
            const long hidden = rounded_up(call.hidden, PANEL);
            take(qkv, std::max((wide + width) * channels, hidden * channels + width * call.hidden));
            proj = qkv + wide * channels;
            fc1 = qkv;
            fc2 = qkv + hidden * channels;
        }
        take(of_padding, 3 * channels + SLACK);
        take(rows, call.num_windows * call.area);
        return at;
    }
};

// The whole block on all windows of `call`: attention of all windows first, then the MLP of all their tokens.
template <class Real>
void run_block(const Block& call) {
    const long channels = call.channels, hidden = call.hidden, threads = call.threads;
    Shared<Real> shared;
    char* scratch = shared.lay_out(call, static_cast<char*>(call.workspace));
    const long each = bytes_of<Scratch<Real>>(call);
    const Layer<Real> qkv(call.qkv, 3 * channels, channels, shared.qkv), proj(call.proj, channels, channels, shared.proj);
    const Layer<Real> fc1(call.fc1, hidden, channels, shared.fc1), fc2(call.fc2, channels, hidden, shared.fc2);
    long count = 0;
    for (long slot = 0; slot < call.num_windows * call.area; ++slot)
        if (call.rows[slot] < call.num_tokens) shared.rows[count++] = call.rows[slot];
    for (long c = 0; c < 3 * channels; c += LANES) store(shared.of_padding + c, bias_at<Real>(call.qkv, c));
    if (call.cosine) to_cosines(shared.of_padding, call);
    const long most_windows = std::max<long>(1, TILE / call.area);
    const long window_tiles = rounded_up((call.num_windows + most_windows - 1) / most_windows, threads);
    const Tiles row_tiles(count, threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<Real> own;
        own.lay_out(call, scratch + thread_number() * each);
        std::fill_n(own.zeros, 3 * channels + SLACK, Real{});
        qkv.matrix.pack();
        proj.matrix.pack();
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < window_tiles; ++tile)
            attention_pass(call, own, qkv, proj, shared.of_padding, call.num_windows * tile / window_tiles,
                           call.num_windows * (tile + 1) / window_tiles);
        fc1.matrix.pack();
        fc2.matrix.pack();
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < row_tiles.count; ++tile) {
            const long first = row_tiles.first(tile);
            mlp_pass(call, own, fc1, fc2, shared.rows + first, row_tiles.first(tile + 1) - first);
        }
    }
}

// Bytes of workspace that `call` needs.
template <class Real>
int64_t workspace_of(const Block& call) {
    return bytes_of<Shared<Real>>(call) + call.threads * bytes_of<Scratch<Real>>(call);
}

}  // namespace
