// How cam_backward_cuda shares a call out: what is read, by which blocks, and where it lies in their shared
// memory.
#pragma once

#include <algorithm>

#include "diffcam/cam.h"

namespace diffcam {
namespace cam_backward_planning {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kMostChunk = 64;  // channels of a block

// A tensor, or nothing.
template <typename Void>
struct Operand {
    Void* data;
    int64_t image, target, channel;
    int64_t position;  // between neighbours where that is the same for all of them
    int64_t spatial[kSpatialRank];
};

struct Task {
    Operand<const void> activations, gradients;
    Operand<void> grad_activations, grad_gradients;
    const void* grad_raw;
    void* scratch;
    int targets, channels, positions;
    int extent[kSpatialRank];
    CamMethod method;
    bool constant;            // gradients are the same at every position
    bool channels_are_inner;  // neighbours in memory are channels, not positions
    int chunk;                // channels of a block
    int parts;                // threads of a channel, when summing
    int lanes;                // how many of them are neighbouring lanes, a power of two
    // What takes part:
    bool has_terms, has_sums;  // channels have terms, and sums to find them
    bool needs_total, sums_activations, sums_gradients;
    bool stages_activations, stages_gradients;
    bool uses_activations, uses_gradients;  // for the results
    bool terms_in_shared;
    int terms_at, activations_at, gradients_at;  // bytes of shared memory, after totals, offsets and partials
};

constexpr int64_t kMostChannels = 1 << 30;
constexpr int64_t kMostPositions = 1 << 27;  // so that a block's elements are counted in 32 bits
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int kBlocksAtATime = 4;             // that a multiprocessor's shared memory should hold
constexpr int kElementsWithoutCopies = 1024;  // of a block that copies nothing
constexpr int kLeastBlocks = 2;               // for each multiprocessor, while blocks can be smaller

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t accumulator_bytes(ScalarType type) { return type == ScalarType::float64 ? 8 : 4; }

inline bool has_terms(const CamShape& shape, CamMethod method) {
    return shape.constant_gradients || method == CamMethod::gradcam || method == CamMethod::xgradcam ||
           method == CamMethod::gradcam_plus_plus;
}

// Terms of all targets fit shared memory, however many channels a block has.
inline bool terms_fit(const CamShape& shape, const CudaQueue& queue) {
    return shape.targets * kMostChunk * 2 * accumulator_bytes(shape.type) <=
           queue.shared_bytes / (2 * kBlocksAtATime);
}

// The stride between neighbouring positions, or 0 where it is not the same for all of them.
inline int64_t position_stride(const int64_t* strides, const Extent& extent) {
    int64_t step = 0, inner = 1;
    for (int d = kSpatialRank - 1; d >= 0; --d) {
        if (extent.size[d] == 1) continue;  // its stride says nothing
        if (inner == 1) step = strides[d];
        if (strides[d] != inner * step) return 0;
        inner *= extent.size[d];
    }
    return inner == 1 ? 1 : step;
}

template <typename Void, typename AnyView>
Operand<Void> operand_of(const AnyView& view, const Extent& extent) {
    Operand<Void> operand{view.data, view.image_stride, view.target_stride, view.channel_stride, 0, {}};
    std::copy(view.spatial_stride, view.spatial_stride + kSpatialRank, operand.spatial);
    operand.position = position_stride(view.spatial_stride, extent);
    return operand;
}

struct Layouts {
    bool planar, interleaved;  // with 16-byte accesses that fit
};

template <typename Void>
inline void restrict_layouts(const Operand<Void>& operand, const CamShape& shape, bool has_targets,
                             Layouts& layouts) {
    const int64_t vector = 16 / scalar_bytes(shape.type), positions = shape.extent.positions();
    const bool aligned = reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 &&
                         (shape.images == 1 || operand.image % vector == 0) &&
                         (!has_targets || shape.targets == 1 || operand.target % vector == 0);
    layouts.planar = layouts.planar && aligned && operand.position == 1 &&
                     (shape.channels == 1 || operand.channel == positions) &&
                     shape.channels * positions % vector == 0;
    layouts.interleaved = layouts.interleaved && aligned && operand.channel == 1 &&
                          shape.channels % vector == 0 &&
                          (positions == 1 || (operand.position != 0 && operand.position % vector == 0));
}

// What is read, and by which step.
inline void plan_reading(const CamShape& shape, Task& task) {
    const CamMethod method = task.method;
    const bool constant = task.constant;
    const bool for_activations = task.grad_activations.data != nullptr;
    const bool for_gradients = task.grad_gradients.data != nullptr;
    const bool is_x = method == CamMethod::xgradcam, is_plus_plus = method == CamMethod::gradcam_plus_plus;
    const bool by_weight = is_x || is_plus_plus || method == CamMethod::gradcam;
    const bool by_element = method == CamMethod::elementwise;
    task.has_terms = has_terms(shape, method);
    task.needs_total = is_x || is_plus_plus;
    const bool needs_product =
        (for_gradients && task.has_terms) || (for_activations && (is_x || is_plus_plus));
    const bool needs_weight = for_activations && by_weight && !constant;
    task.sums_activations = needs_product || (needs_weight && is_x);
    task.sums_gradients = needs_weight;
    task.has_sums = needs_product || needs_weight || task.needs_total;
    task.uses_activations =
        (for_gradients && !constant && (is_x || !by_weight)) || (for_activations && by_element);
    task.uses_gradients =
        !constant && ((for_activations && (is_x || !by_weight)) ||
                      (for_gradients && (is_plus_plus || by_element || method == CamMethod::layercam)));
}

// Shares the channels out and lays out shared memory, whose size is returned.
inline int64_t plan_blocks(const CamShape& shape, const CudaQueue& queue, const Layouts& layouts, bool wide,
                           Task& task) {
    const int64_t element = scalar_bytes(shape.type), sum = accumulator_bytes(shape.type);
    const int64_t positions = std::max<int64_t>(shape.extent.positions(), 1);
    // Also what is used but once: a copy keeps more of it on its way than a block's registers would.
    const bool copies_activations =
        wide && (task.sums_activations || task.needs_total || task.uses_activations);
    const bool copies_gradients =
        wide && (task.sums_gradients || (task.uses_gradients && shape.targets == 1));
    const int64_t copies = int{copies_activations} + int{copies_gradients};
    task.channels_are_inner = wide && !layouts.planar;

    // A whole number of 16-byte accesses, of 32-byte sectors where channels are neighbours.
    const int64_t step = !wide ? 1 : task.channels_are_inner ? 32 / element : 16 / element;
    int64_t chunk = copies > 0 ? queue.shared_bytes / kBlocksAtATime / (copies * element * positions)
                               : kElementsWithoutCopies / positions;
    chunk = std::min<int64_t>(chunk, round_up(shape.channels, step)) / step * step;
    chunk = std::max(std::min<int64_t>(chunk, kMostChunk), step);
    while (chunk > step &&
           shape.images * ceil_div(shape.channels, chunk) < kLeastBlocks * queue.multiprocessors) {
        chunk = round_up(chunk / 2, step);
    }
    task.chunk = static_cast<int>(chunk);
    task.parts = 1;
    while (2 * task.parts * task.chunk <= kThreads) task.parts *= 2;
    task.lanes = task.channels_are_inner ? 1 : std::min(task.parts, kLanes);

    task.terms_in_shared = terms_fit(shape, queue);
    int64_t bytes = round_up((2 + 3 * (task.parts / task.lanes)) * chunk * sum, 16);
    task.terms_at = static_cast<int>(bytes);
    if (task.has_terms && task.terms_in_shared) bytes += round_up(shape.targets * chunk * 2 * sum, 16);
    const int64_t tile = round_up(chunk * positions * element, 16);
    task.activations_at = static_cast<int>(bytes);
    task.stages_activations = copies_activations && bytes + tile <= queue.shared_bytes;
    if (task.stages_activations) bytes += tile;
    task.gradients_at = static_cast<int>(bytes);
    task.stages_gradients = copies_gradients && bytes + tile <= queue.shared_bytes;
    if (task.stages_gradients) bytes += tile;
    return bytes;
}

}  // namespace cam_backward_planning
}  // namespace diffcam
