#include "diffcam/overlay.h"
#include "harness.h"

using namespace diffcam;

DIFFCAM_TEST_API int run_overlay(const OverlayShape* shape, const ConstView* maps, const ConstView* images,
                                 const float* table, const OverlayOptions* options, uint8_t* pictures,
                                 const SimulatedDevice* device) {
    const CudaQueue asked{nullptr, device->multiprocessors, device->capability, device->shared_bytes};
    const int64_t bytes = overlay_cuda_scratch_bytes(*shape, *options, asked);
    return shim::run_on(*device, bytes, [&](const CudaQueue& queue, void* scratch) {
        const OverlayOptions passing = *options;
        return overlay_cuda(*shape, *maps, *images, table, passing, pictures, scratch, queue);
    });
}
