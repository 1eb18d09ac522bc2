// The kernels behind cam_backward_cpu: one table for each instruction set and element type.
#pragma once

#include <stdint.h>

#include "cpu/cam.h"

namespace diffcam {

// f(g) = g^3 / (2 g^2 + (sum_s A) g^3 + 1e-6) for g > 0, else 0: what a position adds to the weight of
// gradcam++. Coefficients p and q belong to a channel, r is the gradient of the raw map at a position.

enum class CamBackwardSum : int {
    product,  // sum_s x r
    gated,    // sum_s x r where p x > 0
    squares   // sum_s f(x)^2 with sum_s A = p
};

enum class CamTerm : int {
    weight,            // p r
    weight_and_value,  // p r + q x
    weight_gated,      // p r where p x > 0
    product,           // x r
    rectified,         // relu(x) r
    gated,             // x r where y > 0
    both_gated,        // x r where x y > 0
    constant,          // p
    scaled,            // p x
    plus_plus          // p f'(x) with sum_s A = q
};

struct CamBackwardKernels {
    // sums[c], overwritten, or added to where `accumulate`.
    void (*sums)(CamBackwardSum kind, const CamTile& x, const void* grad_raw, const void* p, int64_t channels,
                 int64_t positions, bool accumulate, void* sums);

    // results of a term for channels x positions, in the layout of x and y (of x where a term has neither):
    // rows of positions where it is planar, of channels otherwise, row_stride apart. Overwritten, starting
    // from offsets[c] unless that is null, or added to where `accumulate`. Rounded to elements where
    // `rounded`.
    void (*terms)(CamTerm term, const CamTile& x, const CamTile& y, const void* grad_raw, const void* p,
                  const void* q, const void* offsets, int64_t channels, int64_t positions, bool accumulate,
                  bool rounded, void* results, int64_t row_stride);

    // Rounds results that are contiguous to elements and stores them with any strides; positions count as in
    // CamKernels::copy_tile.
    void (*store_tile)(const void* results, bool planar, int64_t channels, int64_t first_position,
                       int64_t positions, void* destination, int64_t channel_stride,
                       const int64_t* spatial_stride, const int64_t* extent);
};

// Indexed by ScalarType.
namespace standard {
extern const CamBackwardKernels cam_backward_kernels[4];
}
namespace avx2 {
extern const CamBackwardKernels cam_backward_kernels[4];
}
namespace avx512 {
extern const CamBackwardKernels cam_backward_kernels[4];
}

}  // namespace diffcam
