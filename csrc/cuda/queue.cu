// What a launcher must know of the device.
#include <cuda_runtime.h>

#include "diffcam/cuda.h"

namespace diffcam {

int cuda_queue(int device, void* stream, CudaQueue* queue) {
    int major = 0;
    int minor = 0;
    int shared_bytes = 0;
    const struct {
        int* value;
        cudaDeviceAttr attribute;
    } wanted[] = {{&queue->multiprocessors, cudaDevAttrMultiProcessorCount},
                  {&major, cudaDevAttrComputeCapabilityMajor},
                  {&minor, cudaDevAttrComputeCapabilityMinor},
                  {&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
    for (const auto& item : wanted) {
        const cudaError_t error = cudaDeviceGetAttribute(item.value, item.attribute, device);
        if (error != cudaSuccess) return error;
    }
    queue->stream = stream;
    queue->capability = 10 * major + minor;
    queue->shared_bytes = shared_bytes;
    return cudaSuccess;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace diffcam
