#include "diffcam/cam.h"
#include "harness.h"

using namespace diffcam;

// A gradient whose data is null is not wanted.
DIFFCAM_TEST_API int run_cam_backward(const CamShape* shape, const void* grad_raw,
                                      const ConstView* activations, const ConstView* gradients, int method,
                                      const View* grad_activations, const View* grad_gradients,
                                      const SimulatedDevice* device) {
    const CudaQueue asked{nullptr, device->multiprocessors, device->capability, device->shared_bytes};
    const CamMethod chosen = static_cast<CamMethod>(method);
    const int64_t bytes = cam_backward_cuda_scratch_bytes(*shape, *activations, *gradients, chosen,
                                                          grad_activations->data != nullptr,
                                                          grad_gradients->data != nullptr, asked);
    return shim::run_on(*device, bytes, [&](const CudaQueue& queue, void* scratch) {
        return cam_backward_cuda(*shape, grad_raw, *activations, *gradients, chosen, *grad_activations,
                                 *grad_gradients, scratch, queue);
    });
}
