// Vectors of LANES numbers and what is computed on one: the same code for AVX-512, AVX2 and CPUs without them.
//
// "Real" is the type of the tensors, float or BFloat. BFloat is only stored: numbers are widened to float to compute.
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
constexpr int LANES = 16, TALL = 14;  // rows of a product at a time: 28 of 32 registers hold sums
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
    uint16_t bits;  // the upper half of a float
};

namespace {

// LANES numbers from memory, which need not be aligned; bfloat16 is widened.
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

// LANES numbers into memory, which need not be aligned.
void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// The same in bfloat16: rounded to the nearest, of two to the even one; NaN stays NaN.
void store(BFloat* to, Floats value) {
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

// One step of a transposition. Lanes whose number has the bit `step` move from `upper` to `lower`; lanes of `lower`
// without that bit move to `upper`. The lanes that stay keep their place, the others move by `step`.
//
// Args: upper, lower (LANES), changed in place; step, a power of two below LANES.
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

// LANES reductions at once: lane i of the result is rows[i] reduced by `both`.
//
// Args: rows (LANES, LANES), overwritten; both(Floats, Floats) -> Floats, such as a sum or a maximum.
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

// One number as float.
float widened(float value) { return value; }
float widened(BFloat value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// One float as Real, rounded as `store` does.
template <class Real>
Real narrowed(float value) {
    Real lanes[LANES];
    store(lanes, Floats{} + value);
    return lanes[0];
}

// Sum of all lanes.
float sum(Floats value) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        Floats other = value;
        exchange(value, other, step);
        value += other;
    }
    return value[0];
}

// e^x of each lane, for x up to 0, to about 2e-7. Values below -87 count as -87; NaN stays NaN.
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

// The exact GELU of each lane. erf(x / sqrt 2) is a rational function, fitted to 2e-8 up to x = 5.6; beyond, it is 1.
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
