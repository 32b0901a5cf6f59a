// Patch merging and patch embedding: rows gathered from a map or from images, times weights.
//
// timm's PatchMerging and PatchEmbed say what they compute.
#pragma once
#include "layers.hpp"

enum NormOf : int64_t { NONE, ROWS, RESULTS };  // what is normalised: nothing, gathered rows, or results

// The fields of `_Projection`, `_Merging` and `_Embedding` in native.py.
struct Projection {
    void* results;    // (rows, columns), written
    void* workspace;  // as many bytes as `workspace_of` says
    int64_t rows, depth, columns, norm_of, threads;
    Norm norm;
    Affine layer;
};
struct Merging {  // depth is four times `channels`
    const void* tokens;  // (batch, height, width, channels); results (batch, height / 2, width / 2, columns), rounded up
    int64_t height, width, channels;
    Projection projection;
};
struct Embedding {  // depth is channels * side * side
    const void* images;  // (batch, channels, height, width); results (batch, height / side, width / side, columns)
    int64_t height, width, channels, side;
    Projection projection;
};

namespace {

// Row `number` of a merging: four neighbours, those of the left column first as timm has it, zeros past odd sides.
//
// Args: number, of a merged token in all maps; to (4 * channels), written.
template <class Real>
void gather(const Merging& call, long number, Real* to) {
    const long cols = (call.width + 1) / 2, rows = (call.height + 1) / 2, channels = call.channels;
    const long image = number / (rows * cols), row = number / cols % rows * 2, col = number % cols * 2;
    for (long right = 0; right < 2; ++right)
        for (long down = 0; down < 2; ++down, to += channels) {
            if (row + down < call.height && col + right < call.width) {
                const long token = (image * call.height + row + down) * call.width + col + right;
                std::memcpy(to, static_cast<const Real*>(call.tokens) + token * channels, channels * sizeof(Real));
            } else {
                std::fill_n(to, channels, Real{});
            }
        }
}

// Row `number` of an embedding: a square of an image, channel by channel.
//
// Args: number, of a patch in all images; to (channels * side * side), written.
template <class Real>
void gather(const Embedding& call, long number, Real* to) {
    const long cols = call.width / call.side, rows = call.height / call.side, side = call.side;
    const long image = number / (rows * cols), row = number / cols % rows * side, col = number % cols * side;
    for (long channel = image * call.channels; channel < (image + 1) * call.channels; ++channel)
        for (long down = 0; down < side; ++down, to += side) {
            const Real* from = static_cast<const Real*>(call.images) + (channel * call.height + row + down) * call.width + col;
            if (side == 4)
                std::memcpy(to, from, 4 * sizeof(Real));  // no call
            else
                std::memcpy(to, from, side * sizeof(Real));
        }
}

// Workspace of one thread.
template <class Real>
struct Gathered {
    Real *rows, *panel;
    float* left;
    long stride;

    char* lay_out(const Projection& call, char* at) {
        const Taker take{at};
        stride = call.depth + SLACK;
        take(rows, Tiles::MOST * stride);
        take(panel, packs_once(call.rows, call.threads) ? 0 : call.depth * PANEL);
        take(left, call.norm_of == RESULTS ? Tiles::MOST * call.columns : 0);
        return at;
    }
};

// Some rows of the result: gathered, normalised if need be, multiplied, normalised if need be.
//
// Args: own, the workspace of this thread; first, count: the rows.
template <class Real, class Call>
void project(const Call& whole, Gathered<Real>& own, const Layer<Real>& layer, long first, long count) {
    const Projection& call = whole.projection;
    const long columns = call.columns;
    for (long row = 0; row < count; ++row) {
        Real* to = own.rows + row * own.stride;
        gather(whole, first + row, to);
        if (call.norm_of == ROWS)
            normalise<Real>(to, call.depth, call.norm, [&](long c, Floats value) { store(to + c, value); });
    }
    Real* results = static_cast<Real*>(call.results) + first * columns;
    layer.apply(count, own.rows, own.stride, own.panel, [&](long row, long column, Floats sums) {
        if (call.norm_of == RESULTS)
            store(own.left + row * columns + column, sums);
        else
            store(results + row * columns + column, sums);
    });
    for (long row = 0; row < count && call.norm_of == RESULTS; ++row)
        normalise<Real>(own.left + row * columns, columns, call.norm,
                        [&](long c, Floats value) { store(results + row * columns + c, value); });
}

// All panels, at the start of the workspace; null when each thread packs its own.
template <class Real>
struct Panels {
    Real* all = nullptr;

    char* lay_out(const Projection& call, char* at) {
        if (packs_once(call.rows, call.threads)) Taker{at}(all, rounded_up(call.columns, PANEL) * call.depth);
        return at;
    }
};

// A patch merging or a patch embedding, written to `results`.
template <class Real, class Call>
void run_projection(const Call& whole) {
    const Projection& call = whole.projection;
    Panels<Real> panels;
    char* scratch = panels.lay_out(call, static_cast<char*>(call.workspace));
    const long each = bytes_of<Gathered<Real>>(call);
    const Layer<Real> layer(call.layer, call.columns, call.depth, panels.all);
    const Tiles tiles(call.rows, call.threads);
#pragma omp parallel num_threads(call.threads)
    {
        Gathered<Real> own;
        own.lay_out(call, scratch + thread_number() * each);
        layer.matrix.pack();
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < tiles.count; ++tile)
            project(whole, own, layer, tiles.first(tile), tiles.first(tile + 1) - tiles.first(tile));
    }
}

// Bytes of workspace that `call` needs.
template <class Real>
int64_t workspace_of(const Projection& call) {
    return bytes_of<Panels<Real>>(call) + call.threads * bytes_of<Gathered<Real>>(call);
}

}  // namespace
