#include "diffcam/saliency_contrast.h"
#include "harness.h"

using namespace diffcam;

DIFFCAM_TEST_API int run_saliency_contrast(const SaliencyContrastShape* shape, const ConstView* saliency,
                                           const ConstView* rivals, void* contrast,
                                           const SimulatedDevice* device) {
    const CudaQueue asked{nullptr, device->multiprocessors, device->capability, device->shared_bytes};
    const int64_t bytes = saliency_contrast_cuda_scratch_bytes(*shape, asked);
    return shim::run_on(*device, bytes, [&](const CudaQueue& queue, void* scratch) {
        return saliency_contrast_cuda(*shape, *saliency, *rivals, contrast, scratch, queue);
    });
}
