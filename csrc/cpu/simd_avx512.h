// Vectors of 64 bytes: AVX-512 F, BW, VL and DQ. Included by cpu/simd.h, which says what each function does.
#pragma once

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

DIFFCAM_INLINE Vec<float> broadcast(float x) { return {_mm512_set1_ps(x)}; }
DIFFCAM_INLINE Vec<double> broadcast(double x) { return {_mm512_set1_pd(x)}; }
DIFFCAM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
}
DIFFCAM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return {_mm512_fmadd_pd(a.raw, b.raw, c.raw)};
}
DIFFCAM_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<float> where_positive(Vec<float> condition, Vec<float> value) {
    return {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition.raw, _mm512_setzero_ps(), _CMP_GT_OQ), value.raw)};
}
DIFFCAM_INLINE Vec<double> where_positive(Vec<double> condition, Vec<double> value) {
    return {
        _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(condition.raw, _mm512_setzero_pd(), _CMP_GT_OQ), value.raw)};
}
DIFFCAM_INLINE Vec<float> where_nonzero(Vec<float> condition, Vec<float> value) {
    return {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition.raw, _mm512_setzero_ps(), _CMP_NEQ_UQ), value.raw)};
}
DIFFCAM_INLINE Vec<double> where_nonzero(Vec<double> condition, Vec<double> value) {
    return {
        _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(condition.raw, _mm512_setzero_pd(), _CMP_NEQ_UQ), value.raw)};
}
DIFFCAM_INLINE bool any_nan(Vec<float> a) { return _mm512_cmp_ps_mask(a.raw, a.raw, _CMP_UNORD_Q) != 0; }
DIFFCAM_INLINE bool any_nan(Vec<double> a) { return _mm512_cmp_pd_mask(a.raw, a.raw, _CMP_UNORD_Q) != 0; }
DIFFCAM_INLINE float sum(Vec<float> a) { return _mm512_reduce_add_ps(a.raw); }
DIFFCAM_INLINE double sum(Vec<double> a) { return _mm512_reduce_add_pd(a.raw); }

DIFFCAM_INLINE __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
DIFFCAM_INLINE __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
DIFFCAM_INLINE __m512 widen_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
DIFFCAM_INLINE __m256i narrow_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}

DIFFCAM_INLINE Vec<float> load(const float* p) { return {_mm512_loadu_ps(p)}; }
DIFFCAM_INLINE Vec<double> load(const double* p) { return {_mm512_loadu_pd(p)}; }
DIFFCAM_INLINE Vec<float> load(const BFloat16* p) {
    return {widen_bfloat16(_mm256_loadu_si256((const __m256i*)p))};
}
DIFFCAM_INLINE Vec<float> load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
DIFFCAM_INLINE Vec<float> load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first16(n), p)}; }
DIFFCAM_INLINE Vec<double> load_first(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(first8(n), p)};
}
DIFFCAM_INLINE Vec<float> load_first(const BFloat16* p, int n) {
    return {widen_bfloat16(_mm256_maskz_loadu_epi16(first16(n), p))};
}
DIFFCAM_INLINE Vec<float> load_first(const Half* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), p))};
}
DIFFCAM_INLINE void store(float* p, Vec<float> x) { _mm512_storeu_ps(p, x.raw); }
DIFFCAM_INLINE void store(double* p, Vec<double> x) { _mm512_storeu_pd(p, x.raw); }
DIFFCAM_INLINE void store(BFloat16* p, Vec<float> x) {
    _mm256_storeu_si256((__m256i*)p, narrow_bfloat16(x.raw));
}
DIFFCAM_INLINE void store(Half* p, Vec<float> x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
DIFFCAM_INLINE void store_first(float* p, Vec<float> x, int n) {
    _mm512_mask_storeu_ps(p, first16(n), x.raw);
}
DIFFCAM_INLINE void store_first(double* p, Vec<double> x, int n) {
    _mm512_mask_storeu_pd(p, first8(n), x.raw);
}
DIFFCAM_INLINE void store_first(BFloat16* p, Vec<float> x, int n) {
    _mm256_mask_storeu_epi16(p, first16(n), narrow_bfloat16(x.raw));
}
DIFFCAM_INLINE void store_first(Half* p, Vec<float> x, int n) {
    const __m256i bits = _mm512_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, first16(n), bits);
}

DIFFCAM_INLINE void split_pairs(RawBits pairs, Vec<float>* even, Vec<float>* odd) {
    even->raw = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd->raw = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
DIFFCAM_INLINE void load_pairs(const BFloat16* p, Vec<float>* even, Vec<float>* odd) {
    split_pairs(_mm512_loadu_si512(p), even, odd);
}
DIFFCAM_INLINE void load_pairs_first(const BFloat16* p, int n, Vec<float>* even, Vec<float>* odd) {
    split_pairs(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p), even, odd);
}

DIFFCAM_INLINE void interleave(Vec<float> even, Vec<float> odd, Vec<float>* first, Vec<float>* second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    first->raw = _mm512_permutex2var_ps(even.raw, low, odd.raw);
    second->raw = _mm512_permutex2var_ps(even.raw, high, odd.raw);
}
DIFFCAM_INLINE void deinterleave(Vec<float> first, Vec<float> second, Vec<float>* even, Vec<float>* odd) {
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    even->raw = _mm512_permutex2var_ps(first.raw, low, second.raw);
    odd->raw = _mm512_permutex2var_ps(first.raw, high, second.raw);
}

DIFFCAM_INLINE Vec<float> sum_each(const Vec<float>* rows) {
    __m512 pair[8], quad[4], half[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = rows[2 * i].raw, b = rows[2 * i + 1].raw;
        pair[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    for (int i = 0; i < 2; ++i) {
        half[i] = _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0x88) +
                  _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0xdd);
    }
    return {_mm512_shuffle_f32x4(half[0], half[1], 0x88) + _mm512_shuffle_f32x4(half[0], half[1], 0xdd)};
}
DIFFCAM_INLINE Vec<double> sum_each(const Vec<double>* rows) {
    __m512d pair[4], half[2];
    for (int i = 0; i < 4; ++i) {
        const __m512d a = rows[2 * i].raw, b = rows[2 * i + 1].raw;
        pair[i] = _mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; ++i) {
        half[i] = _mm512_shuffle_f64x2(pair[2 * i], pair[2 * i + 1], 0x88) +
                  _mm512_shuffle_f64x2(pair[2 * i], pair[2 * i + 1], 0xdd);
    }
    return {_mm512_shuffle_f64x2(half[0], half[1], 0x88) + _mm512_shuffle_f64x2(half[0], half[1], 0xdd)};
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
