// Matrix products with packed weights.
//
// A panel holds PANEL columns (outputs) of a matrix, input by input: (depth, PANEL). In bfloat16 two inputs stand
// together, as one word: (depth / 2, PANEL, 2), and `depth` is even.
#pragma once
#include "vectors.hpp"

namespace {

// A few rows times one panel. All sums stay in registers until the end.
//
// Args: a (TALLNESS, depth) with `stride` elements from row to row; panel, as above; sums (TALLNESS, PANEL), written,
// with `apart` elements from row to row.
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

// The same in bfloat16, with sums in float; called only where the CPU multiplies bfloat16 (`has_bfloat`).
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

// Calls strip(first row, number of rows) for all `rows`, TALL at a time and fewer at the end. The number is a
// std::integral_constant.
template <class Strip>
void in_strips(long rows, Strip&& strip) {
    long row = 0;
    for (; row + TALL <= rows; row += TALL) strip(row, std::integral_constant<int, TALL>());
    for (; row + TALL / 2 <= rows; row += TALL / 2) strip(row, std::integral_constant<int, TALL / 2>());
    for (; row + 2 <= rows; row += 2) strip(row, std::integral_constant<int, 2>());
    for (; row < rows; ++row) strip(row, std::integral_constant<int, 1>());
}

// Rows times a matrix in panels.
//
// Args: a (rows, depth) with `stride` elements from row to row; columns, a multiple of LANES; panel_at(column) -> the
// panel that starts there, which must stand until the next call; end(row, column, Floats) gets LANES sums from that
// column on.
template <class Real, class PanelAt, class End>
void multiply(long rows, long depth, long columns, const Real* a, long stride, PanelAt&& panel_at, End&& end) {
    if (!rows) return;  // no panel need be packed
    alignas(64) float sums[TALL * PANEL];
    for (long column = 0; column < columns; column += PANEL) {
        const Real* panel = panel_at(column);
        in_strips(rows, [&](long row, auto tallness) {
            product<tallness>(depth, a + row * stride, stride, panel, sums, PANEL);
            for (int i = 0; i < tallness; ++i) end(row + i, column, load(sums + i * PANEL));
            if (column + LANES < columns)
                for (int i = 0; i < tallness; ++i) end(row + i, column + LANES, load(sums + i * PANEL + LANES));
        });
    }
}

// The same into sums (rows, columns), written; `columns` is a multiple of PANEL.
template <class Real, class PanelAt>
void multiply_into(float* sums, long rows, long depth, long columns, const Real* a, long stride, PanelAt&& panel_at) {
    for (long column = 0; column < columns; column += PANEL)
        in_strips(rows, [&](long row, auto tallness) {
            product<tallness>(depth, a + row * stride, stride, panel_at(column), sums + row * columns + column, columns);
        });
}

// A square of words into a panel: word k of row j goes to panel[k][j].
//
// Args: sources (LANES), each pointing to LANES words; panel (LANES, PANEL), of which LANES columns are written.
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

// A matrix of weights (columns, depth), as torch keeps it, multiplied in panels.
//
// For many rows all threads pack all panels once, into `panels`. For few rows that takes longer than packing each panel
// when it is needed: then `panels` is null.
template <class Real>
struct Matrix {
    const void* weights;
    long columns, depth;
    Real* panels;  // or null

    // Packs all panels; called by all threads of a parallel region, which share the work and wait for its end.
    void pack() const {
        if (!panels) return;
#pragma omp for schedule(static)
        for (long column = 0; column < columns; column += LANES)
            pack(column, panels + column / PANEL * PANEL * depth + column % PANEL * PAIR);
    }

    // The panel that starts at `column`. When it is not packed yet, it is packed into space (depth, PANEL), which
    // belongs to this thread.
    const Real* panel(long column, Real* space) const {
        if (panels) return panels + column * depth;
        for (long half = 0; half < PANEL && column + half < columns; half += LANES)
            pack(column + half, space + half * PAIR);
        return space;
    }

  private:
    static constexpr long PAIR = 4 / sizeof(Real);
    static constexpr long AHEAD = 8 * LANES;  // words between the one that is read and the one that is fetched

    // Packs LANES columns from `column` on, half a panel, into `to` (depth, PANEL).
    void pack(long column, Real* to) const {
        const long words = depth / PAIR;
        const int32_t* from = static_cast<const int32_t*>(weights) + column * words;
        for (long first = 0; first < words; first += LANES) {
            const long word = std::min(first, words - LANES);  // the last square may overlap the one before
            const long ahead = word + AHEAD < words ? word + AHEAD : word + AHEAD + (LANES - 1) * words;
            const int32_t* sources[LANES];
            for (int j = 0; j < LANES; ++j) {
                sources[j] = from + j * words + word;
                __builtin_prefetch(from + j * words + ahead);
            }
            transpose(sources, reinterpret_cast<int32_t*>(to) + word * PANEL);
        }
    }
};

}  // namespace
