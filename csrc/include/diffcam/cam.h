// Class activation maps: gradient weighting, pooling over channels, ReLU and normalisation in one call.
#pragma once

#include <stdint.h>

#include "diffcam/cuda.h"
#include "diffcam/parallel.h"
#include "diffcam/tensor_view.h"

namespace diffcam {

enum class CamMethod : int {
    gradcam = 0,
    gradcam_plus_plus = 1,
    xgradcam = 2,
    hirescam = 3,
    layercam = 4,
    elementwise = 5
};

enum class Normalization : int { none = 0, max = 1, minmax = 2 };

struct CamShape {
    int64_t images;
    int64_t targets;
    int64_t channels;
    Extent extent;
    ScalarType type;          // of activations and gradients; sums are float, or double for float64
    bool constant_gradients;  // gradients are (images, targets, channels): the same at every position
};

// maps: contiguous (images, targets, positions), float, or double for float64.
void cam_cpu(const CamShape& shape, const ConstView& activations, const ConstView& gradients,
             CamMethod method, bool relu, Normalization normalize, double eps, void* maps,
             const Parallel& parallel);

// Gradient of the maps before ReLU and normalisation. grad_raw: contiguous (images, targets, positions),
// float or double. A gradient whose data is null is not computed; the others have the type and shape of their
// input.
void cam_backward_cpu(const CamShape& shape, const void* grad_raw, const ConstView& activations,
                      const ConstView& gradients, CamMethod method, const View& grad_activations,
                      const View& grad_gradients, const Parallel& parallel);

// The same on a GPU: every pointer is to device memory, and nothing has happened yet when these return.
// scratch: as many bytes as the function before says, aligned to 256, needed until the queued work is done.
// Returns 0 or a CUDA error.
int64_t cam_cuda_scratch_bytes(const CamShape& shape, const ConstView& activations,
                               const ConstView& gradients, CamMethod method, const CudaQueue& queue);
int cam_cuda(const CamShape& shape, const ConstView& activations, const ConstView& gradients,
             CamMethod method, bool relu, Normalization normalize, double eps, void* maps, void* scratch,
             const CudaQueue& queue);

int64_t cam_backward_cuda_scratch_bytes(const CamShape& shape, const ConstView& activations,
                                        const ConstView& gradients, CamMethod method, bool for_activations,
                                        bool for_gradients, const CudaQueue& queue);
int cam_backward_cuda(const CamShape& shape, const void* grad_raw, const ConstView& activations,
                      const ConstView& gradients, CamMethod method, const View& grad_activations,
                      const View& grad_gradients, void* scratch, const CudaQueue& queue);

}  // namespace diffcam
