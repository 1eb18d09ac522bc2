// Vectors of float and double for one instruction set, chosen by the flags of the file that includes this.
//
// Everything lives in namespace diffcam::DIFFCAM_CAPABILITY and, inside it, an unnamed namespace, and nothing
// from the standard library is included: no symbol compiled for a newer processor can replace one of baseline
// code.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 complains about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#ifndef DIFFCAM_CAPABILITY
#define DIFFCAM_CAPABILITY standard
#endif

#define DIFFCAM_INLINE inline __attribute__((always_inline))

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
using RawFloat = __m512;
using RawDouble = __m512d;
using RawBits = __m512i;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
using RawFloat = __m256;
using RawDouble = __m256d;
using RawBits = __m256i;
#else
constexpr int kVectorBytes = 16;
typedef float RawFloat __attribute__((vector_size(16)));
typedef double RawDouble __attribute__((vector_size(16)));
typedef uint32_t RawBits __attribute__((vector_size(16)));
#endif

template <typename T>
struct Vec;

template <>
struct Vec<float> {
    using Scalar = float;
    static constexpr int kLanes = kVectorBytes / 4;
    RawFloat raw;
};

template <>
struct Vec<double> {
    using Scalar = double;
    static constexpr int kLanes = kVectorBytes / 8;
    RawDouble raw;
};

// What sums over elements of type E are kept in.
template <typename E>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <typename E>
using Accumulator = typename AccumulatorOf<E>::type;

template <typename T>
DIFFCAM_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
    return {a.raw + b.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
    return {a.raw - b.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
    return {a.raw * b.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
    return {a.raw / b.raw};
}

// Hints that the cache line `bytes` after `pointer` will be read. The address need not be valid.
DIFFCAM_INLINE void prefetch(const void* pointer, int64_t bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(pointer) + bytes));
}

// Scalar conversions.

DIFFCAM_INLINE float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
DIFFCAM_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

DIFFCAM_INLINE float to_accumulator(float x) { return x; }
DIFFCAM_INLINE double to_accumulator(double x) { return x; }
DIFFCAM_INLINE float to_accumulator(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
DIFFCAM_INLINE float to_accumulator(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    // 2^112 moves the exponent from half's bias to float's, subnormal numbers included.
    const uint32_t scaled = to_bits(from_bits(magnitude << 13) * 0x1p112f);
    return from_bits(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : scaled));
}

DIFFCAM_INLINE void from_accumulator(float x, float* out) { *out = x; }
DIFFCAM_INLINE void from_accumulator(double x, double* out) { *out = x; }
DIFFCAM_INLINE void from_accumulator(float x, BFloat16* out) {
    const uint32_t bits = to_bits(x);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // To nearest, ties to even; NaN stays NaN.
    out->bits =
        static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40u) : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
DIFFCAM_INLINE void from_accumulator(float x, Half* out) {
    const uint32_t sign = to_bits(x) >> 16 & 0x8000u;
    const uint32_t bits = to_bits(x) & 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) {
        half = 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // at least 65520 rounds to infinity
        half = 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24, ties to even
        half = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
    } else {
        half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

// What each instruction set provides, in a header of its own:
//
// - load(p), load_first(p, n): a full vector, or its first n lanes (0 <= n <= lanes) with zeros after them.
//   Nothing beyond is touched. Half precisions are widened. Where n does not change within a loop, load_first
//   costs no more there than load: its mask is hoisted.
// - store(p, x), store_first(p, x, n): the same, rounding to nearest.
// - load_pairs(p, &even, &odd), load_pairs_first(p, n, &even, &odd): 2 * lanes bfloat16 values with one load,
//   those at even places and those at odd ones. Cheaper than two loads where the order does not matter.
// - interleave(even, odd, &first, &second): from that order to the natural one. deinterleave: back.
// - fma(a, b, c): a * b + c.
// - maximum(a, b), minimum(a, b): b where either is NaN.
// - where_positive(x, value), where_nonzero(x, value): value where it holds, else zero. NaN counts as nonzero
//   and not as positive.
// - any_nan(x): whether a lane is NaN.
// - sum(x): of all lanes. sum_each(rows): lane i is the sum of the lanes of rows[i], for as many rows as
// there
//   are lanes; a transposition with additions, far cheaper than a sum for each row.

template <typename T>
DIFFCAM_INLINE Vec<T> zero() {
    return Vec<T>{};
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_standard.h"
#endif

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

template <typename T>
DIFFCAM_INLINE Vec<T> relu(Vec<T> x) {
    return maximum(zero<T>(), x);
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
