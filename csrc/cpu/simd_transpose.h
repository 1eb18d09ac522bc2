// Small transpositions, for tensors whose layouts differ.
#pragma once

#include "cpu/simd.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

constexpr int kTransposed = 8;  // rows and columns of a block

// to[c * to_stride + r] = from[r * from_stride + c] for 8 rows and 8 columns.
template <typename E>
DIFFCAM_INLINE void transpose_block(const E* from, int64_t from_stride, E* to, int64_t to_stride) {
#if defined(__AVX2__)
    if constexpr (sizeof(E) == 4) {
        __m256 pair[8], quad[8];
        for (int i = 0; i < 4; ++i) {
            const __m256 a = _mm256_loadu_ps((const float*)(from + 2 * i * from_stride));
            const __m256 b = _mm256_loadu_ps((const float*)(from + (2 * i + 1) * from_stride));
            pair[2 * i] = _mm256_unpacklo_ps(a, b);
            pair[2 * i + 1] = _mm256_unpackhi_ps(a, b);
        }
        for (int i = 0; i < 2; ++i) {  // rows 4 i to 4 i + 3; quad[4 i + k] holds columns k and k + 4
            for (int k = 0; k < 2; ++k) {
                const __m256 a = pair[4 * i + k], b = pair[4 * i + 2 + k];
                quad[4 * i + 2 * k] = _mm256_shuffle_ps(a, b, 0x44);
                quad[4 * i + 2 * k + 1] = _mm256_shuffle_ps(a, b, 0xee);
            }
        }
        for (int k = 0; k < 4; ++k) {
            _mm256_storeu_ps((float*)(to + k * to_stride),
                             _mm256_permute2f128_ps(quad[k], quad[4 + k], 0x20));
            _mm256_storeu_ps((float*)(to + (k + 4) * to_stride),
                             _mm256_permute2f128_ps(quad[k], quad[4 + k], 0x31));
        }
        return;
    }
    if constexpr (sizeof(E) == 2) {
        __m128i rows[8], pairs[8], quads[8];
        for (int i = 0; i < 8; ++i) rows[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
        for (int i = 0; i < 4; ++i) {
            pairs[2 * i] = _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {  // rows 4 i to 4 i + 3; quads[4 i + k] holds columns 2 k and 2 k + 1
            for (int k = 0; k < 2; ++k) {
                const __m128i a = pairs[4 * i + k], b = pairs[4 * i + 2 + k];
                quads[4 * i + 2 * k] = _mm_unpacklo_epi32(a, b);
                quads[4 * i + 2 * k + 1] = _mm_unpackhi_epi32(a, b);
            }
        }
        for (int k = 0; k < 4; ++k) {
            _mm_storeu_si128((__m128i*)(to + 2 * k * to_stride), _mm_unpacklo_epi64(quads[k], quads[4 + k]));
            _mm_storeu_si128((__m128i*)(to + (2 * k + 1) * to_stride),
                             _mm_unpackhi_epi64(quads[k], quads[4 + k]));
        }
        return;
    }
#endif
    for (int r = 0; r < kTransposed; ++r)
        for (int c = 0; c < kTransposed; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

// The same for any number of rows and columns.
template <typename E>
void transpose(const E* from, int64_t from_stride, int64_t rows, int64_t columns, E* to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += kTransposed) {
        for (int64_t c = 0; c < columns; c += kTransposed) {
            const E* corner = from + r * from_stride + c;
            if (rows - r >= kTransposed && columns - c >= kTransposed) {
                transpose_block(corner, from_stride, to + c * to_stride + r, to_stride);
            } else {
                const int64_t last_row = rows - r < kTransposed ? rows - r : kTransposed;
                const int64_t last_column = columns - c < kTransposed ? columns - c : kTransposed;
                for (int64_t i = 0; i < last_row; ++i)
                    for (int64_t k = 0; k < last_column; ++k)
                        to[(c + k) * to_stride + r + i] = corner[i * from_stride + k];
            }
        }
    }
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
