// Registers of numbers, the same for every CPU; bfloat16 is widened to float.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

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

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
struct BFloat {
    uint16_t bits;
};

namespace {

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

}  // namespace
