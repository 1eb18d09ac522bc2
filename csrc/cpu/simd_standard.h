// The compiler's own vectors of 16 bytes: SSE2, NEON or whatever the target has. Included by cpu/simd.h,
// which says what each function does.
#pragma once

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

DIFFCAM_INLINE Vec<float> broadcast(float x) { return {RawFloat{x, x, x, x}}; }
DIFFCAM_INLINE Vec<double> broadcast(double x) { return {RawDouble{x, x}}; }
template <typename T>
DIFFCAM_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    return {a.raw * b.raw + c.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
    return {a.raw > b.raw ? a.raw : b.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
    return {a.raw < b.raw ? a.raw : b.raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> where_positive(Vec<T> condition, Vec<T> value) {
    return {condition.raw > zero<T>().raw ? value.raw : zero<T>().raw};
}
template <typename T>
DIFFCAM_INLINE Vec<T> where_nonzero(Vec<T> condition, Vec<T> value) {
    return {condition.raw != zero<T>().raw ? value.raw : zero<T>().raw};
}
template <typename T>
DIFFCAM_INLINE bool any_nan(Vec<T> a) {
    bool found = false;
    for (int i = 0; i < Vec<T>::kLanes; ++i) found |= a.raw[i] != a.raw[i];
    return found;
}
DIFFCAM_INLINE float sum(Vec<float> a) { return (a.raw[0] + a.raw[1]) + (a.raw[2] + a.raw[3]); }
DIFFCAM_INLINE double sum(Vec<double> a) { return a.raw[0] + a.raw[1]; }

template <typename E>
DIFFCAM_INLINE Vec<Accumulator<E> > load_first(const E* p, int n) {
    Vec<Accumulator<E> > x = {};
    for (int i = 0; i < n; ++i) x.raw[i] = to_accumulator(p[i]);
    return x;
}
template <typename E>
DIFFCAM_INLINE void store_first(E* p, Vec<Accumulator<E> > x, int n) {
    for (int i = 0; i < n; ++i) from_accumulator(x.raw[i], p + i);
}
DIFFCAM_INLINE Vec<float> load(const float* p) {
    Vec<float> x;
    __builtin_memcpy(&x.raw, p, 16);
    return x;
}
DIFFCAM_INLINE Vec<double> load(const double* p) {
    Vec<double> x;
    __builtin_memcpy(&x.raw, p, 16);
    return x;
}
DIFFCAM_INLINE RawBits load_words(const uint16_t* p) { return RawBits{p[0], p[1], p[2], p[3]}; }
DIFFCAM_INLINE Vec<float> load(const BFloat16* p) { return {(RawFloat)(load_words(&p->bits) << 16)}; }
DIFFCAM_INLINE Vec<float> load(const Half* p) {
    const RawBits bits = load_words(&p->bits);
    const RawBits magnitude = bits & 0x7fffu;
    const RawBits scaled = (RawBits)((RawFloat)(magnitude << 13) * 0x1p112f);
    const RawBits special = (RawBits)(magnitude >= 0x7c00u) & (0x7f800000u | magnitude << 13);
    return {(RawFloat)((bits & 0x8000u) << 16 | scaled | special)};
}
DIFFCAM_INLINE void store(float* p, Vec<float> x) { __builtin_memcpy(p, &x.raw, 16); }
DIFFCAM_INLINE void store(double* p, Vec<double> x) { __builtin_memcpy(p, &x.raw, 16); }
DIFFCAM_INLINE void store(BFloat16* p, Vec<float> x) { store_first(p, x, 4); }
DIFFCAM_INLINE void store(Half* p, Vec<float> x) { store_first(p, x, 4); }

// Written for little-endian processors, as is every processor PyTorch is distributed for.
DIFFCAM_INLINE void load_pairs(const BFloat16* p, Vec<float>* even, Vec<float>* odd) {
    RawBits pairs;
    __builtin_memcpy(&pairs, p, 16);
    even->raw = (RawFloat)(pairs << 16);
    odd->raw = (RawFloat)(pairs & 0xffff0000u);
}
DIFFCAM_INLINE void load_pairs_first(const BFloat16* p, int n, Vec<float>* even, Vec<float>* odd) {
    BFloat16 buffer[8] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    load_pairs(buffer, even, odd);
}

DIFFCAM_INLINE void interleave(Vec<float> even, Vec<float> odd, Vec<float>* first, Vec<float>* second) {
    const RawFloat a = even.raw, b = odd.raw;
    first->raw = RawFloat{a[0], b[0], a[1], b[1]};
    second->raw = RawFloat{a[2], b[2], a[3], b[3]};
}
DIFFCAM_INLINE void deinterleave(Vec<float> first, Vec<float> second, Vec<float>* even, Vec<float>* odd) {
    const RawFloat a = first.raw, b = second.raw;
    even->raw = RawFloat{a[0], a[2], b[0], b[2]};
    odd->raw = RawFloat{a[1], a[3], b[1], b[3]};
}
template <typename T>
DIFFCAM_INLINE Vec<T> sum_each(const Vec<T>* rows) {
    Vec<T> sums;
    for (int i = 0; i < Vec<T>::kLanes; ++i) sums.raw[i] = sum(rows[i]);
    return sums;
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
