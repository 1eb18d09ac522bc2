// What the drivers of cam share: layouts of the inputs, and tasks spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "diffcam/cam.h"

namespace diffcam {

constexpr int64_t kBytesPerThread = 96 << 10;  // waking a thread for less does not pay

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(worker, task) for every task, on as many workers as the amount of data deserves.
template <typename Body>
void run_tasks(const Parallel& parallel, int64_t workers, int64_t tasks, Body&& body) {
    workers = std::min(workers, tasks);
    if (workers <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(int64_t{0}, task);
        return;
    }
    std::atomic<int64_t> next{0};
    parallel_for(parallel, workers, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(worker, task);
        }
    });
}

// A tensor with what its strides allow: planes (positions next to each other), rows of channels, or neither.
struct CamSource {
    const char* data;
    int64_t bytes;  // of an element
    int64_t image, target, channel, position;
    int64_t spatial[kSpatialRank];
    bool planar, interleaved;

    const char* at(int64_t n, int64_t t, int64_t c) const {
        return data + bytes * (n * image + t * target + c * channel);
    }
};

inline bool same_at_every_position(const ConstView& view, const Extent& extent) {
    for (int d = 0; d < kSpatialRank; ++d)
        if (extent.size[d] > 1 && view.spatial_stride[d] != 0) return false;
    return true;
}

inline CamSource cam_source(const ConstView& view, const CamShape& shape) {
    CamSource source = {static_cast<const char*>(view.data),
                        scalar_bytes(shape.type),
                        view.image_stride,
                        view.target_stride,
                        view.channel_stride,
                        0,
                        {},
                        false,
                        false};
    std::copy(view.spatial_stride, view.spatial_stride + kSpatialRank, source.spatial);
    // One stride for all positions, where there is one. Strides of dimensions of size one say nothing.
    bool uniform = true;
    int64_t inner = 0;  // positions within the dimensions seen so far; 0 before the first that counts
    for (int d = kSpatialRank - 1; d >= 0; --d) {
        const int64_t size = shape.extent.size[d];
        if (size == 1) continue;
        if (inner == 0) {
            source.position = view.spatial_stride[d];
            inner = size;
        } else {
            uniform = uniform && view.spatial_stride[d] == inner * source.position;
            inner *= size;
        }
    }
    const bool one_position = inner == 0, one_channel = shape.channels == 1;
    source.planar = one_position || (uniform && source.position == 1);
    source.interleaved = uniform && (one_channel || view.channel_stride == 1);
    return source;
}

// Uninitialised memory, on the stack where it is little.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : heap_(count > kInline ? new T[count] : nullptr) {}
    T* get() { return heap_ ? heap_.get() : inline_; }

  private:
    static constexpr int64_t kInline = 4096 / sizeof(T);
    std::unique_ptr<T[]> heap_;
    T inline_[kInline];
};

}  // namespace diffcam
