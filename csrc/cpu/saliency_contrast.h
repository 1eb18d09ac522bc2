// What the driver of saliency_contrast and its kernels, one an instruction set, have in common.
#pragma once

#include <stdint.h>

#include "diffcam/saliency_contrast.h"

namespace diffcam {

// One of the two maps. Positions of a channel lie side by side, or are packed into a thread's memory first.
struct SaliencySource {
    ConstView view;
    bool planar;
};

// The arguments of saliency_contrast_cpu.
struct SaliencyContrastCall {
    SaliencyContrastShape shape;
    SaliencySource saliency;
    SaliencySource rivals;
    void* contrast;
};

// Rivals [begin, end) of one image, in the channels of one energy.
struct SaliencyContrastTask {
    int64_t image;
    int64_t row;
    int64_t begin;
    int64_t end;
};

struct SaliencyContrastKernels {
    // packed: a thread's memory for two planes of accumulators, where a source is not planar.
    void (*contrast)(const SaliencyContrastCall& call, const SaliencyContrastTask& task, void* packed);
};

namespace standard {
extern const SaliencyContrastKernels saliency_contrast_kernels;
}
namespace avx2 {
extern const SaliencyContrastKernels saliency_contrast_kernels;
}
namespace avx512 {
extern const SaliencyContrastKernels saliency_contrast_kernels;
}

}  // namespace diffcam
