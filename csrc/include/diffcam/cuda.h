// Where a CUDA kernel goes. No CUDA header is needed to include this.
#pragma once

#include <stdint.h>

namespace diffcam {

struct CudaQueue {
    void* stream;          // a cudaStream_t of the current device
    int multiprocessors;   // of that device
    int capability;        // 10 * major + minor: 80, 90, 100
    int64_t shared_bytes;  // the most shared memory that one block may ask for
};

// Describes a device, which must be the current one. Like every function here that launches or asks CUDA,
// returns 0, or an error code that cuda_error_text explains.
int cuda_queue(int device, void* stream, CudaQueue* queue);

const char* cuda_error_text(int error);

}  // namespace diffcam
