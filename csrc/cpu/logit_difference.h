// What the driver of the logit difference and its kernels, one an instruction set, have in common.
#pragma once

#include <stdint.h>

#include "diffcam/logit_difference.h"

namespace diffcam {

// The arguments of logit_difference_cpu.
struct LogitDifferenceCall {
    LogitDifferenceShape shape;
    const void* logits;
    int64_t image_stride;
    int64_t class_stride;
    const int64_t* chosen;
    LogitDifferenceOptions options;
    LogitDifferenceResult result;
};

// Memory of one thread. Elements are float, or double for float64 logits, except in `order`.
struct LogitDifferenceScratch {
    void* logits;    // as many as there are classes
    void* values;    // as many as rivals are compared
    void* gradient;  // as many as rivals are compared
    int64_t* order;  // finer: as many as the highest rank
};

struct LogitDifferenceKernels {
    // Computes rows [begin, end), row = image * targets + target. Rows do not depend on each other.
    void (*rows)(const LogitDifferenceCall& call, int64_t begin, int64_t end,
                 const LogitDifferenceScratch& scratch);
};

namespace standard {
extern const LogitDifferenceKernels logit_difference_kernels;
}
namespace avx2 {
extern const LogitDifferenceKernels logit_difference_kernels;
}
namespace avx512 {
extern const LogitDifferenceKernels logit_difference_kernels;
}

}  // namespace diffcam
