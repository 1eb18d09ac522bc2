// What the driver of overlay and its kernels, one an instruction set, have in common.
#pragma once

#include <stdint.h>

#include "diffcam/overlay.h"

namespace diffcam {

// The arguments of overlay_cpu.
struct OverlayCall {
    OverlayShape shape;
    ConstView maps;
    ConstView images;
    OverlayOptions options;
    uint8_t* pictures;
    // In quarters of 1/255, ten bits each for red, green and blue from the lowest: exact for tables of bytes.
    uint32_t colors[kOverlayColors];
    // Whether mixtures wait in a thread's memory until their largest value is known, which takes whole maps.
    bool keeps;
};

// What a map spans, once resized; meaningless where there is a NaN.
struct OverlayRange {
    double low;
    double high;
    bool nan;
};

// Rows [begin, end) of the picture of map `index` = image * targets + target.
struct OverlayRows {
    int64_t index;
    int64_t begin;
    int64_t end;
};

struct OverlayKernels {
    // Bytes that one thread needs, aligned to kOverlayAlignment.
    int64_t (*scratch_bytes)(const OverlayCall& call);

    // To be called on a thread's memory before the others.
    void (*prepare)(const OverlayCall& call, void* scratch);

    OverlayRange (*range)(const OverlayCall& call, const OverlayRows& rows, void* scratch);

    // The largest value of the mixture, where Blend::uniform divides by that.
    float (*brightest)(const OverlayCall& call, const OverlayRows& rows, const OverlayRange& range,
                       void* scratch);

    // After `brightest` on the same memory and rows, where the call keeps mixtures and the blend is uniform.
    void (*draw)(const OverlayCall& call, const OverlayRows& rows, const OverlayRange& range, float brightest,
                 void* scratch);
};

constexpr int64_t kOverlayAlignment = 64;

namespace standard {
extern const OverlayKernels overlay_kernels;
}
namespace avx2 {
extern const OverlayKernels overlay_kernels;
}
namespace avx512 {
extern const OverlayKernels overlay_kernels;
}

}  // namespace diffcam
