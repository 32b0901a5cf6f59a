// What blocks and projections share: linear layers, LayerNorm, and the layout of their workspace.
#pragma once
#include "products.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

constexpr long TILE = 98;   // rows that a thread works on: two windows of 49
constexpr long SLACK = 32;  // elements after a row that may be read and written

struct Norm {  // the fields of `_Norm` in native.py
    const void *weight, *bias;  // (channels), (channels); null when there is no norm
    float eps;
};
struct Affine {  // the fields of `_Affine` in native.py
    const void *weight, *bias;  // (out, in), (out) or null
};

namespace {

// The number of this thread among those of a parallel region.
long thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The first multiple of `step` that is not below `value`.
long rounded_up(long value, long step) { return (value + step - 1) / step * step; }

// True when each thread has more than one tile: packing all weights once is then faster than packing them per tile.
//
// Args: rows that are multiplied in all; threads.
bool packs_once(long rows, long threads) { return rows > TILE * threads; }

// LayerNorm of one row, computed in float.
//
// Args: row (channels); norm, whose weight and bias are Real; end(channel, Floats) gets LANES results from that channel
// on. `channels` is a multiple of LANES. `end` may write over `row`: a channel is read before its result is given.
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

// LANES numbers of the bias of a layer from `column` on; zeros when it has none.
template <class Real>
Floats bias_at(const Affine& layer, long column) {
    return layer.bias ? load(static_cast<const Real*>(layer.bias) + column) : Floats{};
}

// A linear layer: rows times weights, plus bias. `columns` are its outputs, `depth` its inputs.
template <class Real>
struct Layer {
    Affine affine;
    Matrix<Real> matrix;

    Layer(const Affine& affine, long columns, long depth, Real* panels)
        : affine(affine), matrix{affine.weight, columns, depth, panels} {}

    // The layer on some rows.
    //
    // Args: a (rows, depth) with `stride` elements from row to row; space (depth, PANEL) of this thread, for a panel
    // that is not packed yet; end(row, column, Floats) as in `multiply`.
    template <class End>
    void apply(long rows, const Real* a, long stride, Real* space, End&& end) const {
        multiply(
            rows, matrix.depth, matrix.columns, a, stride, [&](long column) { return matrix.panel(column, space); },
            [&](long row, long column, Floats sums) { end(row, column, sums + bias_at<Real>(affine, column)); });
    }
};

// Tiles of rows for threads to take, at most MOST rows each: tile i has the rows first(i) to first(i + 1) - 1.
// Their number is a multiple of the threads, their borders lie between strips of TALL rows.
struct Tiles {
    static constexpr long MOST = (TILE + TALL - 1) / TALL * TALL;  // rows in one
    long rows, strips, count;

    Tiles(long rows, long threads)
        : rows(rows), strips((rows + TALL - 1) / TALL), count(rounded_up((rows + TILE - 1) / TILE, threads)) {}

    long first(long tile) const { return std::min(rows, strips * tile / count * TALL); }
};

// Lays out arrays in a workspace one after another, each at the start of a cache line; `at` moves on.
struct Taker {
    char*& at;

    template <class Element>
    void operator()(Element*& pointer, long count) const {
        pointer = reinterpret_cast<Element*>(at);
        at += rounded_up(count * sizeof(Element), 64);
    }
};

// Bytes of workspace that a `Layout` takes for a call, from the start of a cache line on.
template <class Layout, class Call>
long bytes_of(const Call& call) {
    Layout layout;
    return layout.lay_out(call, nullptr) - static_cast<char*>(nullptr);
}

}  // namespace
