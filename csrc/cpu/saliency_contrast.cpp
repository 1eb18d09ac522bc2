// Driver of saliency_contrast on the CPU: chooses the kernel, gives each thread its memory and its rows.
#include "cpu/saliency_contrast.h"

#include <algorithm>
#include <memory>

#include "cpu/cam_source.h"
#include "diffcam/cpu_capability.h"

namespace diffcam {
namespace {

const SaliencyContrastKernels& kernels() {
    switch (cpu_capability()) {
#ifdef DIFFCAM_HAS_AVX512
        case CpuCapability::avx512:
            return avx512::saliency_contrast_kernels;
#endif
#ifdef DIFFCAM_HAS_AVX2
        case CpuCapability::avx2:
            return avx2::saliency_contrast_kernels;
#endif
        default:
            return standard::saliency_contrast_kernels;
    }
}

SaliencySource source_of(const ConstView& view, const SaliencyContrastShape& shape) {
    const CamShape like{shape.images, shape.targets, shape.channels, shape.extent, shape.type, false};
    return {view, cam_source(view, like).planar};
}

}  // namespace

void saliency_contrast_cpu(const SaliencyContrastShape& shape, const ConstView& saliency,
                           const ConstView& rivals, void* contrast, const Parallel& parallel) {
    const int64_t positions = shape.extent.positions(), rows = shape.images * shape.rows();
    if (rows * shape.targets * positions == 0) return;
    const SaliencyContrastCall call{shape, source_of(saliency, shape), source_of(rivals, shape), contrast};

    const int64_t accumulator = shape.type == ScalarType::float64 ? 8 : 4;
    const int64_t bytes = shape.images * shape.channels * positions *
                          (scalar_bytes(shape.type) * (1 + shape.targets) + accumulator * shape.targets);
    const int64_t worth = std::max<int64_t>(1, bytes / kBytesPerThread);
    // Rivals are shared out only where there are few rows: each part sums the squares of its saliency again.
    const int64_t parts = std::min(shape.targets, ceil_div(std::min<int64_t>(parallel.threads, worth), rows));
    const int64_t workers = std::min({int64_t{parallel.threads}, worth, rows * parts});

    // Before any thread starts, so that running out of memory is an exception where it can be caught.
    const bool packs = !call.saliency.planar || !call.rivals.planar;
    const int64_t packed_bytes = packs ? 2 * positions * accumulator : 0;
    std::unique_ptr<unsigned char[]> memory(packs ? new unsigned char[packed_bytes * workers] : nullptr);
    const SaliencyContrastKernels& kernel = kernels();
    run_tasks(parallel, workers, rows * parts, [&](int64_t worker, int64_t index) {
        const int64_t row = index / parts, part = index % parts;
        const SaliencyContrastTask task{row / shape.rows(), row % shape.rows(), shape.targets * part / parts,
                                        shape.targets * (part + 1) / parts};
        kernel.contrast(call, task, memory.get() + packed_bytes * worker);
    });
}

}  // namespace diffcam
