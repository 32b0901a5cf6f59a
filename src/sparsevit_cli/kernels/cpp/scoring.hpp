// Scores and ranking of windows, for one or two partitions of the same maps; `windows.py` says what is computed.
#pragma once
#include "vectors.hpp"

struct Scoring {  // the fields of `_Scoring` in native.py
    const void* tokens;                  // (batch, num_tokens, channels)
    const int64_t *unshifted, *shifted;  // (num_windows, area), num_tokens for padding; `shifted` may be null
    float* magnitude;                    // (batch, num_tokens), written
    float* scores;                       // (one or two partitions, batch, num_windows), written
    int64_t* ranking;                    // the same shape, written: windows, the `count` best ones first
    int64_t* rows;                       // (partitions, batch, count, area), written; batch * num_tokens for padding
    int64_t batch, num_tokens, channels, num_windows, area, count, is_l2, threads;
};

namespace {

// A token's share in the score of its window: the mean of its absolute values, or their L2 norm when `is_l2`.
//
// Args: token (channels), a multiple of LANES.
template <class Real>
float magnitude_of(const Real* token, const Scoring& call) {
    Floats total = {};
    for (long c = 0; c < call.channels; c += LANES) {
        const Floats value = load(token + c);
        total += call.is_l2 ? value * value : value < 0.0f ? -value : value;
    }
    return call.is_l2 ? std::sqrt(sum(total)) : sum(total) / call.channels;
}

// The best windows of one map: by falling score, NaN before all numbers, and of equal scores the first window first.
//
// Args: scores (num_windows); ranking (num_windows), written, of which the first `count` are in order.
void rank(const float* scores, int64_t* ranking, const Scoring& call) {
    std::iota(ranking, ranking + call.num_windows, 0);
    std::partial_sort(ranking, ranking + call.count, ranking + call.num_windows, [&](int64_t one, int64_t other) {
        const bool is_nan = scores[one] != scores[one], other_is_nan = scores[other] != scores[other];
        if (is_nan != other_is_nan) return is_nan;
        if (is_nan || scores[one] == scores[other]) return one < other;
        return scores[one] > scores[other];
    });
}

// Scores, ranking and rows, for all maps and partitions: writes the four arrays of `call` that are not const.
template <class Real>
void run_scoring(const Scoring& call) {
    const long tokens = call.batch * call.num_tokens, windows = call.batch * call.num_windows;
    const long partitions = call.shifted ? 2 : 1;
    const auto places_of = [&](long partition) { return partition ? call.shifted : call.unshifted; };
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; ++token)
            call.magnitude[token] = magnitude_of(static_cast<const Real*>(call.tokens) + token * call.channels, call);
#pragma omp for schedule(static)
        for (long number = 0; number < partitions * windows; ++number) {
            const int64_t* places = places_of(number / windows) + number % call.num_windows * call.area;
            const float* magnitude = call.magnitude + number % windows / call.num_windows * call.num_tokens;
            float total = 0;
            for (long slot = 0; slot < call.area; ++slot) {
                const float share = places[slot] < call.num_tokens ? magnitude[places[slot]] : 0.0f;
                total += share * share;
            }
            call.scores[number] = std::sqrt(total);
        }
#pragma omp for schedule(static)
        for (long map = 0; map < partitions * call.batch; ++map)
            rank(call.scores + map * call.num_windows, call.ranking + map * call.num_windows, call);
#pragma omp for schedule(static)
        for (long number = 0; number < partitions * call.batch * call.count; ++number) {
            const long map = number / call.count, image = map % call.batch;
            const int64_t window = call.ranking[map * call.num_windows + number % call.count];
            const int64_t* places = places_of(map / call.batch) + window * call.area;
            for (long slot = 0; slot < call.area; ++slot) {
                const bool is_token = places[slot] < call.num_tokens;
                call.rows[number * call.area + slot] =
                    is_token ? image * call.num_tokens + places[slot] : call.batch * call.num_tokens;
            }
        }
    }
}

}  // namespace
