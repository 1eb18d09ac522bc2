// Strided views of tensors that live elsewhere: what every kernel takes instead of a framework's tensor.
#pragma once

#include <stdint.h>

namespace diffcam {

enum class ScalarType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

inline int64_t scalar_bytes(ScalarType type) {
    return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
}

constexpr int kSpatialRank = 3;

// Positions of a map. Networks with fewer than three spatial dimensions have leading sizes of one.
struct Extent {
    int64_t size[kSpatialRank];
    int64_t positions() const { return size[0] * size[1] * size[2]; }
};

// Strides count elements, not bytes, and may be zero (expanded tensors) or negative (flipped arrays).
struct ConstView {
    const void* data;
    int64_t image_stride;
    int64_t target_stride;
    int64_t channel_stride;
    int64_t spatial_stride[kSpatialRank];
};

struct View {
    void* data;
    int64_t image_stride;
    int64_t target_stride;
    int64_t channel_stride;
    int64_t spatial_stride[kSpatialRank];
};

}  // namespace diffcam
