// Vectors of 32 bytes: AVX2, FMA and F16C. Included by cpu/simd.h, which says what each function does.
#pragma once

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

DIFFCAM_INLINE Vec<float> broadcast(float x) { return {_mm256_set1_ps(x)}; }
DIFFCAM_INLINE Vec<double> broadcast(double x) { return {_mm256_set1_pd(x)}; }
DIFFCAM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
}
DIFFCAM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return {_mm256_fmadd_pd(a.raw, b.raw, c.raw)};
}
DIFFCAM_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<double> minimum(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.raw, b.raw)}; }
DIFFCAM_INLINE Vec<float> where_positive(Vec<float> condition, Vec<float> value) {
    return {_mm256_and_ps(_mm256_cmp_ps(condition.raw, _mm256_setzero_ps(), _CMP_GT_OQ), value.raw)};
}
DIFFCAM_INLINE Vec<double> where_positive(Vec<double> condition, Vec<double> value) {
    return {_mm256_and_pd(_mm256_cmp_pd(condition.raw, _mm256_setzero_pd(), _CMP_GT_OQ), value.raw)};
}
DIFFCAM_INLINE Vec<float> where_nonzero(Vec<float> condition, Vec<float> value) {
    return {_mm256_and_ps(_mm256_cmp_ps(condition.raw, _mm256_setzero_ps(), _CMP_NEQ_UQ), value.raw)};
}
DIFFCAM_INLINE Vec<double> where_nonzero(Vec<double> condition, Vec<double> value) {
    return {_mm256_and_pd(_mm256_cmp_pd(condition.raw, _mm256_setzero_pd(), _CMP_NEQ_UQ), value.raw)};
}
DIFFCAM_INLINE bool any_nan(Vec<float> a) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.raw, a.raw, _CMP_UNORD_Q)) != 0;
}
DIFFCAM_INLINE bool any_nan(Vec<double> a) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a.raw, a.raw, _CMP_UNORD_Q)) != 0;
}
DIFFCAM_INLINE float sum(Vec<float> a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.raw), _mm256_extractf128_ps(a.raw, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DIFFCAM_INLINE double sum(Vec<double> a) {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.raw), _mm256_extractf128_pd(a.raw, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

DIFFCAM_INLINE __m256i first_dwords(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DIFFCAM_INLINE __m256i first_qwords(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
// The first n of 16 16-bit values. There is no such masked load: whole pairs, then the odd one.
DIFFCAM_INLINE __m256i load_first_words(const uint16_t* p, int n) {
    const __m256i pairs = _mm256_maskload_epi32((const int*)p, first_dwords(n >> 1));
    if ((n & 1) == 0) return pairs;
    const __m256i last =
        _mm256_cmpeq_epi32(_mm256_set1_epi32(n >> 1), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_or_si256(pairs, _mm256_and_si256(last, _mm256_set1_epi32(p[n - 1])));
}
DIFFCAM_INLINE void store_first_words(uint16_t* p, __m128i words, int n) {
    uint16_t buffer[8];
    _mm_storeu_si128((__m128i*)buffer, words);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
DIFFCAM_INLINE __m256 widen_bfloat16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
DIFFCAM_INLINE __m128i narrow_bfloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
DIFFCAM_INLINE __m128i narrow_half(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

DIFFCAM_INLINE Vec<float> load(const float* p) { return {_mm256_loadu_ps(p)}; }
DIFFCAM_INLINE Vec<double> load(const double* p) { return {_mm256_loadu_pd(p)}; }
DIFFCAM_INLINE Vec<float> load(const BFloat16* p) {
    return {widen_bfloat16(_mm_loadu_si128((const __m128i*)p))};
}
DIFFCAM_INLINE Vec<float> load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
DIFFCAM_INLINE Vec<float> load_first(const float* p, int n) {
    return {_mm256_maskload_ps(p, first_dwords(n))};
}
DIFFCAM_INLINE Vec<double> load_first(const double* p, int n) {
    return {_mm256_maskload_pd(p, first_qwords(n))};
}
DIFFCAM_INLINE Vec<float> load_first(const BFloat16* p, int n) {
    return {widen_bfloat16(_mm256_castsi256_si128(load_first_words(&p->bits, n)))};
}
DIFFCAM_INLINE Vec<float> load_first(const Half* p, int n) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(load_first_words(&p->bits, n)))};
}
DIFFCAM_INLINE void store(float* p, Vec<float> x) { _mm256_storeu_ps(p, x.raw); }
DIFFCAM_INLINE void store(double* p, Vec<double> x) { _mm256_storeu_pd(p, x.raw); }
DIFFCAM_INLINE void store(BFloat16* p, Vec<float> x) {
    _mm_storeu_si128((__m128i*)p, narrow_bfloat16(x.raw));
}
DIFFCAM_INLINE void store(Half* p, Vec<float> x) { _mm_storeu_si128((__m128i*)p, narrow_half(x.raw)); }
DIFFCAM_INLINE void store_first(float* p, Vec<float> x, int n) {
    _mm256_maskstore_ps(p, first_dwords(n), x.raw);
}
DIFFCAM_INLINE void store_first(double* p, Vec<double> x, int n) {
    _mm256_maskstore_pd(p, first_qwords(n), x.raw);
}
DIFFCAM_INLINE void store_first(BFloat16* p, Vec<float> x, int n) {
    store_first_words(&p->bits, narrow_bfloat16(x.raw), n);
}
DIFFCAM_INLINE void store_first(Half* p, Vec<float> x, int n) {
    store_first_words(&p->bits, narrow_half(x.raw), n);
}

DIFFCAM_INLINE void split_pairs(RawBits pairs, Vec<float>* even, Vec<float>* odd) {
    even->raw = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd->raw = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
DIFFCAM_INLINE void load_pairs(const BFloat16* p, Vec<float>* even, Vec<float>* odd) {
    split_pairs(_mm256_loadu_si256((const __m256i*)p), even, odd);
}
DIFFCAM_INLINE void load_pairs_first(const BFloat16* p, int n, Vec<float>* even, Vec<float>* odd) {
    split_pairs(load_first_words(&p->bits, n), even, odd);
}

DIFFCAM_INLINE void interleave(Vec<float> even, Vec<float> odd, Vec<float>* first, Vec<float>* second) {
    const __m256 low = _mm256_unpacklo_ps(even.raw, odd.raw), high = _mm256_unpackhi_ps(even.raw, odd.raw);
    first->raw = _mm256_permute2f128_ps(low, high, 0x20);
    second->raw = _mm256_permute2f128_ps(low, high, 0x31);
}
DIFFCAM_INLINE void deinterleave(Vec<float> first, Vec<float> second, Vec<float>* even, Vec<float>* odd) {
    const __m256 low = _mm256_permute2f128_ps(first.raw, second.raw, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first.raw, second.raw, 0x31);
    even->raw = _mm256_shuffle_ps(low, high, 0x88);
    odd->raw = _mm256_shuffle_ps(low, high, 0xdd);
}

DIFFCAM_INLINE Vec<float> sum_each(const Vec<float>* rows) {
    __m256 half[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 a = _mm256_hadd_ps(rows[4 * i].raw, rows[4 * i + 1].raw);
        half[i] = _mm256_hadd_ps(a, _mm256_hadd_ps(rows[4 * i + 2].raw, rows[4 * i + 3].raw));
    }
    return {_mm256_permute2f128_ps(half[0], half[1], 0x20) + _mm256_permute2f128_ps(half[0], half[1], 0x31)};
}
DIFFCAM_INLINE Vec<double> sum_each(const Vec<double>* rows) {
    const __m256d a = _mm256_hadd_pd(rows[0].raw, rows[1].raw), b = _mm256_hadd_pd(rows[2].raw, rows[3].raw);
    return {_mm256_permute2f128_pd(a, b, 0x20) + _mm256_permute2f128_pd(a, b, 0x31)};
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
