// Driver of the logit difference on the CPU: chooses the kernel, gives each thread its memory and its rows.
#include "cpu/logit_difference.h"

#include <algorithm>
#include <memory>

#include "diffcam/cpu_capability.h"

namespace diffcam {
namespace {

const LogitDifferenceKernels& kernels() {
    switch (cpu_capability()) {
#ifdef DIFFCAM_HAS_AVX512
        case CpuCapability::avx512:
            return avx512::logit_difference_kernels;
#endif
#ifdef DIFFCAM_HAS_AVX2
        case CpuCapability::avx2:
            return avx2::logit_difference_kernels;
#endif
        default:
            return standard::logit_difference_kernels;
    }
}

// Elements of one call below which waking another thread costs more than it saves.
constexpr int64_t kWorthOneThread = 16384;

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct ScratchLayout {
    int64_t logits;
    int64_t values;
    int64_t order;

    explicit ScratchLayout(const LogitDifferenceCall& call) {
        const LogitDifferenceOptions& options = call.options;
        const bool finer = options.baseline == Baseline::finer;
        const int64_t element = call.shape.type == ScalarType::float64 ? 8 : 4;
        int64_t highest_rank = 0;
        for (int64_t i = 0; finer && i < options.rank_count; ++i) {
            highest_rank = std::max(highest_rank, options.ranks[i]);
        }
        logits = aligned(call.shape.classes * element);
        values = aligned(std::max<int64_t>(1, finer ? options.rank_count : options.top_k) * element);
        order = aligned(std::max<int64_t>(1, highest_rank) * 8);
    }

    int64_t bytes() const { return logits + 2 * values + order; }

    LogitDifferenceScratch at(unsigned char* memory) const {
        return {memory, memory + logits, memory + logits + values,
                reinterpret_cast<int64_t*>(memory + logits + 2 * values)};
    }
};

}  // namespace

void logit_difference_cpu(const LogitDifferenceShape& shape, const void* logits, int64_t image_stride,
                          int64_t class_stride, const int64_t* chosen, const LogitDifferenceOptions& options,
                          const LogitDifferenceResult& result, const Parallel& parallel) {
    const int64_t rows = shape.images * shape.targets;
    if (rows <= 0) return;
    const LogitDifferenceCall call{shape, logits, image_stride, class_stride, chosen, options, result};
    const int64_t worth = rows * shape.classes / kWorthOneThread + 1;
    const int64_t parts = std::max<int64_t>(1, std::min({worth, rows, int64_t{parallel.threads}}));

    // Before any thread starts, so that running out of memory is an exception where the caller can catch it.
    const ScratchLayout layout(call);
    std::unique_ptr<unsigned char[]> memory(new unsigned char[layout.bytes() * parts + kAlignment]);
    unsigned char* first = memory.get();
    first += aligned(reinterpret_cast<uintptr_t>(first)) - reinterpret_cast<uintptr_t>(first);

    const LogitDifferenceKernels& kernel = kernels();
    parallel_for(parallel, parts, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            kernel.rows(call, rows * part / parts, rows * (part + 1) / parts,
                        layout.at(first + part * layout.bytes()));
        }
    });
}

}  // namespace diffcam
