// Maps laid over images as heat: resizing, normalisation, colours and blending into bytes in one call.
#pragma once

#include <stdint.h>

#include "diffcam/cam.h"
#include "diffcam/cuda.h"
#include "diffcam/parallel.h"
#include "diffcam/tensor_view.h"

namespace diffcam {

enum class Blend : int { proportional = 0, uniform = 1 };

// The first four are those of ScalarType.
enum class PixelType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, uint8 = 4 };

struct OverlayShape {
    int64_t images;
    int64_t targets;
    int64_t map_height;
    int64_t map_width;
    int64_t height;
    int64_t width;
    ScalarType map_type;
    PixelType pixel_type;  // from 0 to 1, uint8 from 0 to 255
};

struct OverlayOptions {
    float opacity;  // from 0 to 1
    Normalization normalize;
    Blend blend;
    double eps;
};

constexpr int kOverlayColors = 256;

// maps: (images, targets, map_height, map_width); images: (images, 3 channels, height, width). Both views
// give the strides of rows and columns as the last two spatial ones. table: (kOverlayColors, 3), from 0 to 1.
// pictures: contiguous (images, targets, height, width, 3).
void overlay_cpu(const OverlayShape& shape, const ConstView& maps, const ConstView& images,
                 const float* table, const OverlayOptions& options, uint8_t* pictures,
                 const Parallel& parallel);

// The same on a GPU: every pointer is to device memory, and nothing has happened yet when this returns.
// scratch: as many bytes as the function before says, aligned to 256, needed until the queued work is done.
// Returns 0 or a CUDA error.
int64_t overlay_cuda_scratch_bytes(const OverlayShape& shape, const OverlayOptions& options,
                                   const CudaQueue& queue);
int overlay_cuda(const OverlayShape& shape, const ConstView& maps, const ConstView& images,
                 const float* table, const OverlayOptions& options, uint8_t* pictures, void* scratch,
                 const CudaQueue& queue);

}  // namespace diffcam
