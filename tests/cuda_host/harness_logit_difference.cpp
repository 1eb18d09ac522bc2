#include <vector>

#include "diffcam/logit_difference.h"
#include "harness.h"

using namespace diffcam;

// The ranks are gone when the kernels run, as they may be after a launcher has returned.
DIFFCAM_TEST_API int run_logit_difference(const LogitDifferenceShape* shape, const void* logits,
                                          int64_t image_stride, int64_t class_stride, const int64_t* chosen,
                                          const LogitDifferenceOptions* options,
                                          const LogitDifferenceResult* result,
                                          const SimulatedDevice* device) {
    const CudaQueue asked{nullptr, device->multiprocessors, device->capability, device->shared_bytes};
    const int64_t bytes = logit_difference_cuda_scratch_bytes(*shape, *options, asked);
    return shim::run_on(*device, bytes, [&](const CudaQueue& queue, void* scratch) {
        std::vector<int64_t> ranks(options->ranks, options->ranks + options->rank_count);
        LogitDifferenceOptions passing = *options;
        passing.ranks = ranks.data();
        const int error = logit_difference_cuda(*shape, logits, image_stride, class_stride, chosen, passing,
                                                *result, scratch, queue);
        std::fill(ranks.begin(), ranks.end(), INT64_MIN);
        return error;
    });
}
