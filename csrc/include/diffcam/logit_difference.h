// Differences between a class's logit and its rivals', with the gradient with respect to the logits in closed
// form.
#pragma once

#include <stdint.h>

#include "diffcam/cuda.h"
#include "diffcam/parallel.h"
#include "diffcam/tensor_view.h"

namespace diffcam {

enum class Baseline : int { max = 0, mean = 1, logsumexp = 2, expected = 3, finer = 4 };

struct LogitDifferenceShape {
    int64_t images;
    int64_t targets;
    int64_t classes;
    ScalarType type;  // of the logits; results are float, or double for float64
};

struct LogitDifferenceOptions {
    Baseline baseline;
    int64_t top_k;  // 0: all rivals
    double temperature;
    double alpha;          // finer only
    const int64_t* ranks;  // finer only: which of the nearest classes are compared, 1 = nearest
    int64_t rank_count;
};

struct LogitDifferenceResult {  // all contiguous
    void* delta;                // (images, targets)
    void* cotangent;            // (images, targets, classes)
    int64_t* rivals;            // (images, targets, k), k = top_k or rank_count
    void* differences;          // (images, targets, k)
};

// logits: (images, classes) with strides in elements; chosen: contiguous (images, targets), each in [0,
// classes).
void logit_difference_cpu(const LogitDifferenceShape& shape, const void* logits, int64_t image_stride,
                          int64_t class_stride, const int64_t* chosen, const LogitDifferenceOptions& options,
                          const LogitDifferenceResult& result, const Parallel& parallel);

// The same on a GPU: every pointer but options.ranks is to device memory, and nothing has happened yet when
// this returns. A target whose class is out of range gets NaN and rivals of -1. scratch: as many bytes as the
// function before says, aligned to 256, needed until the queued work is done. Returns 0 or a CUDA error.
int64_t logit_difference_cuda_scratch_bytes(const LogitDifferenceShape& shape,
                                            const LogitDifferenceOptions& options, const CudaQueue& queue);
int logit_difference_cuda(const LogitDifferenceShape& shape, const void* logits, int64_t image_stride,
                          int64_t class_stride, const int64_t* chosen, const LogitDifferenceOptions& options,
                          const LogitDifferenceResult& result, void* scratch, const CudaQueue& queue);

// The most ranks that a call on a GPU takes: they travel with the launch.
constexpr int64_t kMostCudaRanks = 256;

}  // namespace diffcam
