// What one saliency map has more of than others, all at energy 1: sums of squares, division, difference and
// ReLU in one call.
#pragma once

#include <stdint.h>

#include "diffcam/cuda.h"
#include "diffcam/parallel.h"
#include "diffcam/tensor_view.h"

namespace diffcam {

struct SaliencyContrastShape {
    int64_t images;
    int64_t targets;  // rivals of an image
    int64_t channels;
    Extent extent;
    ScalarType type;   // of both; sums are float, or double for float64
    bool per_channel;  // each channel has an energy of its own; all of a map have one otherwise

    // What one energy is the norm of: a row, of so many channels.
    int64_t row_channels() const { return per_channel ? 1 : channels; }
    int64_t rows() const { return channels == 0 ? 0 : channels / row_channels(); }
};

// saliency: (images, channels, positions); rivals: (images, targets, channels, positions). contrast:
// contiguous like rivals, float, or double for float64.
void saliency_contrast_cpu(const SaliencyContrastShape& shape, const ConstView& saliency,
                           const ConstView& rivals, void* contrast, const Parallel& parallel);

// The same on a GPU: every pointer is to device memory, and nothing has happened yet when this returns.
// scratch: as many bytes as the function before says, aligned to 256, needed until the queued work is done.
// Returns 0 or a CUDA error.
int64_t saliency_contrast_cuda_scratch_bytes(const SaliencyContrastShape& shape, const CudaQueue& queue);
int saliency_contrast_cuda(const SaliencyContrastShape& shape, const ConstView& saliency,
                           const ConstView& rivals, void* contrast, void* scratch, const CudaQueue& queue);

// Squares of very small or very large values leave the range of float or double. Where a sum of squares does
// not lie between `least` and `most`, it is taken again of values times `small` or `large`: powers of two, so
// that nothing else changes.
template <typename T>
struct EnergyScales;
template <>
struct EnergyScales<float> {
    static constexpr float least = 0x1p-90f, most = 0x1p120f, small = 0x1p100f, large = 0x1p-80f;
};
template <>
struct EnergyScales<double> {
    static constexpr double least = 0x1p-900, most = 0x1p1000, small = 0x1p600, large = 0x1p-600;
};

}  // namespace diffcam
