// CUDA's language extensions, vector types and narrow floats, for a host compiler.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
};
using cudaStream_t = void*;

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Aligned to their size as CUDA's are, so that the undefined-behaviour sanitizer sees an unaligned access.
#define DIFFCAM_SHIM_VECTORS(element, name)                                                              \
    struct alignas(2 * sizeof(element)) name##2 { element x, y; };                                       \
    struct alignas(4 * sizeof(element) > 16 ? 16 : 4 * sizeof(element)) name##4 { element x, y, z, w; }; \
    inline name##2 make_##name##2(element x, element y) { return {x, y}; }                               \
    inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
DIFFCAM_SHIM_VECTORS(int, int)
DIFFCAM_SHIM_VECTORS(unsigned, uint)
DIFFCAM_SHIM_VECTORS(float, float)
DIFFCAM_SHIM_VECTORS(double, double)
#undef DIFFCAM_SHIM_VECTORS

namespace diffcam::shim {

template <typename To, typename From>
inline To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "both have the same size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

}  // namespace diffcam::shim

inline unsigned __float_as_uint(float value) { return diffcam::shim::same_bits<unsigned>(value); }
inline int __float_as_int(float value) { return diffcam::shim::same_bits<int>(value); }
inline float __uint_as_float(unsigned bits) { return diffcam::shim::same_bits<float>(bits); }
inline float __int_as_float(int bits) { return diffcam::shim::same_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return diffcam::shim::same_bits<long long>(value); }
inline double __longlong_as_double(long long bits) { return diffcam::shim::same_bits<double>(bits); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
    return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}

// bfloat16 and float16. Conversions from float round to nearest, ties to even; every NaN becomes 0x7fff.
struct __nv_bfloat16 {
    uint16_t __x;
};
struct __half {
    uint16_t __x;
};
using __nv_bfloat16_raw = __nv_bfloat16;
using __half_raw = __half;

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned{value.__x} << 16); }

inline __nv_bfloat16 __float2bfloat16(float value) {
    if (isnan(value)) return {0x7fff};
    const unsigned bits = __float_as_uint(value);
    const unsigned to_even = 0x7fffu + ((bits >> 16) & 1);
    return {static_cast<uint16_t>((bits + to_even) >> 16)};
}

inline float __half2float(__half value) {
    const unsigned sign = unsigned{value.__x} >> 15 << 31;
    const int exponent = value.__x >> 10 & 0x1f;
    const unsigned fraction = value.__x & 0x3ff;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float magnitude = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                          : ldexpf(static_cast<float>(fraction | 0x400), exponent - 25);
    return sign != 0 ? -magnitude : magnitude;
}

inline __half __float2half(float value) {
    if (isnan(value)) return {0x7fff};
    const unsigned bits = __float_as_uint(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 31 << 15);
    const float magnitude = fabsf(value);
    constexpr float kSmallestNormal = 0x1p-14f;
    if (magnitude < kSmallestNormal) {
        // In units of the smallest subnormal; exact, and rintf rounds ties to even.
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(magnitude * 0x1p24f)))};
    }
    constexpr float kRoundsToInfinity = 65520.0f;
    if (magnitude >= kRoundsToInfinity) return {static_cast<uint16_t>(sign | 0x7c00)};
    const unsigned rebiased = __float_as_uint(magnitude) - (unsigned{127 - 15} << 23);
    const unsigned to_even = 0xfffu + ((rebiased >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rebiased + to_even) >> 13))};
}
