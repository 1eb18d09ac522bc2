#include "diffcam/cam.h"
#include "harness.h"

using namespace diffcam;

DIFFCAM_TEST_API int run_cam(const CamShape* shape, const ConstView* activations, const ConstView* gradients,
                             int method, bool relu, int normalize, double eps, void* maps,
                             const SimulatedDevice* device) {
    const CudaQueue asked{nullptr, device->multiprocessors, device->capability, device->shared_bytes};
    const CamMethod chosen = static_cast<CamMethod>(method);
    const int64_t bytes = cam_cuda_scratch_bytes(*shape, *activations, *gradients, chosen, asked);
    return shim::run_on(*device, bytes, [&](const CudaQueue& queue, void* scratch) {
        return cam_cuda(*shape, *activations, *gradients, chosen, relu, static_cast<Normalization>(normalize),
                        eps, maps, scratch, queue);
    });
}
