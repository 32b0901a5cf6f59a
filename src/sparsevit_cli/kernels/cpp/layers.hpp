// What blocks and projections share: their layers, and room for what they compute.
#pragma once
#include "products.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

constexpr long TILE = 98;   // rows that a thread works on: two windows of 49
constexpr long SLACK = 32;  // elements after a row that may be read and written

struct Norm {
    const void *weight, *bias;
    float eps;
};
struct Affine {
    const void *weight, *bias;  // (out, in), (out) or null
};

namespace {

long thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

long rounded_up(long value, long step) { return (value + step - 1) / step * step; }

// True where threads have more than a tile each: then packing all weights beforehand takes less time.
bool packs_once(long rows, long threads) { return rows > TILE * threads; }

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

// Rows times weights, plus bias.
template <class Real>
struct Layer {
    Affine affine;
    Matrix<Real> matrix;

    Layer(const Affine& affine, long columns, long depth, Real* panels)
        : affine(affine), matrix{affine.weight, columns, depth, panels} {}

    // `a` (rows, depth); `space` for a panel; `end` as in `multiply`.
    template <class End>
    void apply(long rows, const Real* a, long stride, Real* space, End&& end) const {
        multiply(
            rows, matrix.depth, matrix.columns, a, stride, [&](long column) { return matrix.panel(column, space); },
            [&](long row, long column, Floats sums) { end(row, column, sums + bias_at<Real>(affine, column)); });
    }
};

// Rows shared out among threads, in strips that fit the registers: tile i goes from first(i) to first(i + 1).
struct Tiles {
    static constexpr long MOST = (TILE + TALL - 1) / TALL * TALL;  // rows in one
    long rows, strips, count;

    Tiles(long rows, long threads)
        : rows(rows), strips((rows + TALL - 1) / TALL), count(rounded_up((rows + TILE - 1) / TILE, threads)) {}

    long first(long tile) const { return std::min(rows, strips * tile / count * TALL); }
};

// Lays out arrays one after another, each at the start of a cache line.
struct Taker {
    char*& at;

    template <class Element>
    void operator()(Element*& pointer, long count) const {
        pointer = reinterpret_cast<Element*>(at);
        at += rounded_up(count * sizeof(Element), 64);
    }
};

// Bytes that a layout takes from the start of a cache line on.
template <class Layout, class Call>
long bytes_of(const Call& call) {
    Layout layout;
    return layout.lay_out(call, nullptr) - static_cast<char*>(nullptr);
}

}  // namespace
