// Scores of windows, for one or two partitions of the same maps; `windows.py` says what they are.
#pragma once
#include "vectors.hpp"

struct Scoring {  // the same fields in native.py
    const void* tokens;             // (batch, num_tokens, channels)
    const int64_t *plain, *shifted;  // (num_windows, area), num_tokens for padding; `shifted` may be null
    float* magnitude;               // (batch, num_tokens)
    float* scores;                  // (one or two partitions, batch, num_windows)
    int64_t batch, num_tokens, channels, num_windows, area, is_l2, threads;
};

namespace {

// A token's share in the score of its window: the mean of its absolute values, or its norm.
template <class Real>
float magnitude_of(const Real* token, const Scoring& call) {
    Floats total = {};
    for (long c = 0; c < call.channels; c += LANES) {
        const Floats value = load(token + c);
        total += call.is_l2 ? value * value : value < 0.0f ? -value : value;
    }
    return call.is_l2 ? std::sqrt(sum(total)) : sum(total) / call.channels;
}

template <class Real>
void run_scoring(const Scoring& call) {
    const long tokens = call.batch * call.num_tokens, windows = call.batch * call.num_windows;
    const long partitions = call.shifted ? 2 : 1;
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; ++token)
            call.magnitude[token] = magnitude_of(static_cast<const Real*>(call.tokens) + token * call.channels, call);
#pragma omp for schedule(static)
        for (long number = 0; number < partitions * windows; ++number) {
            const int64_t* places = number < windows ? call.plain : call.shifted;
            places += number % call.num_windows * call.area;
            const float* magnitude = call.magnitude + number % windows / call.num_windows * call.num_tokens;
            float total = 0;
            for (long slot = 0; slot < call.area; ++slot) {
                const float share = places[slot] < call.num_tokens ? magnitude[places[slot]] : 0.0f;
                total += share * share;
            }
            call.scores[number] = std::sqrt(total);
        }
    }
}

}  // namespace
