// Tiles: some channels at some positions of one image, copied into shared memory while others are used.
#pragma once

#include "cam_plan.h"
#include "elements.h"

namespace diffcam {

// Where an element (channel, position) lies in shared memory: elements from its start.
struct CamTile {
    int start, channel, position;
};

struct CamRegion {
    int channel, position;  // where it begins
    int channels, positions;
};

// Tiles are always reached through here, so that the compiler knows that they are in shared memory.
template <typename T>
__device__ __forceinline__ T* shared_at(int byte) {
    return reinterpret_cast<T*>(dynamic_shared() + byte);
}

// The tile of a region in a slot of shared memory. It begins as misaligned as its rows do in global memory,
// and its row stride has the remainder of theirs: so wide copies fit every row, whatever its alignment.
template <typename E>
__device__ __forceinline__ CamTile tile_of(const CamPlan& plan, const CamInput& input, const E* image,
                                           const CamRegion& region, int slot) {
    constexpr unsigned kWide = kCamWide / sizeof(E);
    CamTile tile = {slot / static_cast<int>(sizeof(E)), input.row_stride, 1};
    if (plan.channel_rows) tile = {tile.start, 1, input.row_stride};
    if (input.rows) {
        const unsigned element = static_cast<unsigned>(reinterpret_cast<uintptr_t>(image) / sizeof(E)) +
                                 region.channel * static_cast<unsigned>(input.channel) +
                                 region.position * static_cast<unsigned>(input.position);
        tile.start += static_cast<int>(element % kWide);
    }
    return tile;
}

// Starts copying neighbouring elements, by 1 << lanes threads. `target` counts elements of shared memory and
// has the misalignment of `source`. What lies before and after the wide accesses is copied at once.
template <typename E>
__device__ __forceinline__ void copy_line(const E* source, int target, int length, int lane, int lanes) {
    constexpr int kWide = kCamWide / sizeof(E);
    E* shared = shared_at<E>(0) + target;
    const int head = min(-target & (kWide - 1), length), tail = (length - head) & (kWide - 1);
    const int begin = head + lane * kWide, end = length - tail;
    const E* from = source + begin;
    E* to = shared + begin;
#pragma unroll 4
    for (int i = begin; i < end; i += kWide << lanes, from += kWide << lanes, to += kWide << lanes)
        copy_async_16(to, from);
    if (head + tail == 0) return;
    for (int i = lane; i < head; i += 1 << lanes) shared[i] = source[i];
    for (int i = end + lane; i < length; i += 1 << lanes) shared[i] = source[i];
}

template <typename E>
__device__ __forceinline__ void copy_rows(const E* source, int64_t source_stride, int target,
                                          int target_stride, int rows, int length, int lanes) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & ((1 << lanes) - 1);
    const int first = thread >> lanes, step = kCamThreads >> lanes;
    source += first * source_stride;
    target += first * target_stride;
    for (int row = first; row < rows; row += step) {
        copy_line(source, target, length, lane, lanes);
        source += step * source_stride;
        target += step * target_stride;
    }
}

// Any strides, element by element; neighbouring threads take what is likely to be close in memory.
template <typename E>
__device__ __forceinline__ void copy_elements(const CamPlan& plan, const CamInput& input, const E* image,
                                              const CamRegion& region, const CamTile& tile) {
    const bool channels_first = input.channel == 1;
    const int inner = channels_first ? region.channels : region.positions;
    const int count = region.channels * region.positions;
    E* shared = shared_at<E>(0) + tile.start;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kCamThreads) {
        const int outer = i / inner, rest = i - outer * inner;
        const int channel = channels_first ? rest : outer, position = channels_first ? outer : rest;
        const int s = region.position + position, row = s / plan.extent[2], plane = row / plan.extent[1];
        const int64_t offset = (region.channel + channel) * input.channel + plane * input.spatial[0] +
                               (row - plane * plan.extent[1]) * input.spatial[1] +
                               (s - row * plan.extent[2]) * input.spatial[2];
        shared[channel * tile.channel + position * tile.position] = image[offset];
    }
}

template <typename E>
__device__ __forceinline__ void load_tile(const CamPlan& plan, const CamInput& input, const E* image,
                                          const CamRegion& region, int slot) {
    const CamTile tile = tile_of(plan, input, image, region, slot);
    if (!input.rows) return copy_elements(plan, input, image, region, tile);
    const E* source = image + region.channel * input.channel + region.position * input.position;
    if (input.run)
        copy_line(source, tile.start, region.channels * region.positions, static_cast<int>(threadIdx.x),
                  kCamLogThreads);
    else if (plan.channel_rows)
        copy_rows(source, input.position, tile.start, input.row_stride, region.positions, region.channels,
                  plan.row_lanes);
    else
        copy_rows(source, input.channel, tile.start, input.row_stride, region.channels, region.positions,
                  plan.row_lanes);
}

}  // namespace diffcam
