// The kernels behind cam_cpu: one table for each instruction set and element type.
#pragma once

#include <stdint.h>

#include "diffcam/cam.h"

namespace diffcam {

constexpr int64_t kLongRow = 1 << 10;  // bytes of the channels of a position that are next to each other

// Channels x positions of one image and one target, in one of two layouts. Strides count elements.
struct CamTile {
    const void* data;
    int64_t channel_stride;
    int64_t position_stride;
    bool planar;  // position_stride is 1 (a plane for each channel); otherwise channel_stride is 1
};

enum class CamSum : int {
    plain,     // sum_s x
    product,   // sum_s x y, and sum_s x with it
    plus_plus  // sum_s a(x) relu(x): the weight of gradcam++ for gradients x
};

// Elements are of the table's type, everything else is float, or double for float64. Every tile of a call has
// the same layout. Where `accumulate` is false, results are overwritten; where true, added to.
struct CamKernels {
    // sums[c] and, for a product, plain_sums[c] unless that is null. activation_sums[c] = sum_s A is read by
    // plus_plus. A plain sum does not read y; where y holds other data than x, it is fetched into the cache
    // on the way, for the weighted maps that come next.
    void (*channel_sums)(CamSum kind, const CamTile& x, const CamTile& y, const void* activation_sums,
                         int64_t channels, int64_t positions, bool accumulate, void* sums, void* plain_sums);

    // maps[t][s] = sum_c weights[t][c] A[c][s], or sum_c relu(weights[t][c] A[c][s]) where `rectify`.
    void (*weighted_maps)(const CamTile& activations, const void* weights, int64_t weight_stride,
                          int64_t targets, bool rectify, int64_t channels, int64_t positions, bool accumulate,
                          void* maps, int64_t map_stride);

    // map[s] = sum_c of G A, relu(G) A or relu(G A): hirescam, layercam, elementwise.
    void (*product_map)(CamMethod method, const CamTile& activations, const CamTile& gradients,
                        int64_t channels, int64_t positions, bool accumulate, void* map);

    // Whether joint_map takes planes of so many positions.
    bool (*joins)(CamMethod method, int64_t positions);

    // The whole map of a target, for planes: gradients of some channels are summed while activations of the
    // channels before them are weighted, so that both tensors come from memory at once. gradcam, gradcam++.
    void (*joint_map)(CamMethod method, const CamTile& activations, const CamTile& gradients,
                      int64_t channels, int64_t positions, void* map);

    // Copies `channels` x `positions` elements, from any strides, into contiguous planes: destination[c][s].
    // Positions count from first_position through an extent in row-major order.
    void (*copy_tile)(const void* source, int64_t channel_stride, const int64_t* spatial_stride,
                      const int64_t* extent, int64_t channels, int64_t first_position, int64_t positions,
                      void* destination);

    // weights[i] = element i * stride, widened.
    void (*widen)(const void* source, int64_t stride, int64_t count, void* destination);

    // Adds `part_count` partial maps to map, then ReLU and normalisation, in place.
    void (*finish)(void* map, const void* parts, int64_t part_stride, int64_t part_count, int64_t positions,
                   bool relu, Normalization normalize, double eps);
};

// Indexed by ScalarType.
namespace standard {
extern const CamKernels cam_kernels[4];
}
namespace avx2 {
extern const CamKernels cam_kernels[4];
}
namespace avx512 {
extern const CamKernels cam_kernels[4];
}

}  // namespace diffcam
