// Sums over a tile: over the positions of each channel, and over the channels of each position.
#pragma once

#include "cam_tile.h"

namespace diffcam {

// How the threads of a block share the lines of a tile: 1 << log lanes of one warp take a line together.
// They are neighbours where a line's elements are, and otherwise apart, so that neighbouring lanes read
// neighbouring elements either way.
struct CamLanes {
    int log, distance;  // of the lanes of a line, and how far apart they are
    int lane;           // the calling thread's among them
    int first, lines;   // its first line, and how many lines the block takes at a time

    __device__ __forceinline__ CamLanes(int log_lanes, bool neighbours) : log(log_lanes) {
        const int in_warp = 5 - log;  // logarithm of a warp's lines
        const int warp = static_cast<int>(threadIdx.x) >> 5, i = static_cast<int>(threadIdx.x) & 31;
        distance = neighbours ? 1 : 1 << in_warp;
        lane = neighbours ? i & ((1 << log) - 1) : i >> in_warp;
        first = (warp << in_warp) + (neighbours ? i >> log : i & (distance - 1));
        lines = kCamWarps << in_warp;
    }

    // The sum of what the lanes of a line have. A warp calls it together.
    template <typename T>
    __device__ __forceinline__ T sum(T value) const {
        for (int d = distance; d < distance << log; d *= 2) value += __shfl_xor_sync(~0u, value, d);
        return value;
    }
};

// NaN stays NaN.
template <typename T>
__device__ __forceinline__ T rectified(T x) {
    return x < T(0) ? T(0) : x;
}

// The sum of term(i) for i = begin, begin + step, ... The terms of one turn of the loop wait for shared
// memory together.
template <typename T, typename Term>
__device__ __forceinline__ T sum_terms(int begin, int step, int end, Term term) {
    constexpr int kTogether = 4;
    T sum = 0;
    int i = begin;
    for (; i + (kTogether - 1) * step < end; i += kTogether * step) {
        T terms[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) terms[k] = term(i + k * step);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) sum += terms[k];
    }
#pragma unroll 1
    for (; i < end; i += step) sum += term(i);
    return sum;
}

// Sums over positions: of term(channel, position, x[channel, position]), added to the sums of earlier tiles
// or not. A channel's positions fall into segments with a sum each, so that few
// channels occupy all threads.
template <typename E, typename Term>
__device__ __forceinline__ void sum_positions(const CamPlan& plan, const CamTile& x, const CamRegion& region,
                                              bool add, Accumulator<E>* sums, Term term) {
    const CamLanes lanes(plan.sum_lanes, !plan.channel_rows);
    const int log_segments = plan.sum_segments, lines = region.channels << log_segments;
    const int step = 1 << (log_segments + lanes.log);
    for (int start = 0; start < lines; start += lanes.lines) {
        const int line = start + lanes.first;
        Accumulator<E> sum = 0;
        if (line < lines) {
            const int c = line >> log_segments, segment = line & ((1 << log_segments) - 1);
            const E* p = shared_at<E>(0) + x.start + c * x.channel;
            sum = sum_terms<Accumulator<E>>((segment << lanes.log) + lanes.lane, step, region.positions,
                                            [&](int s) { return term(c, s, widen(p[s * x.position])); });
        }
        sum = lanes.sum(sum);
        if (lanes.lane == 0 && line < lines) sums[line] = add ? sums[line] + sum : sum;
    }
}

// One position's term of gradcam++: Chattopadhay et al. 2018, equation 19, with the sum of activations
// outside.
template <typename T>
__device__ __forceinline__ T plus_plus_term(T g, T activation_sum) {
    const T square = g * g;
    const T alpha = square / (2 * square + activation_sum * square * g + static_cast<T>(1e-6));
    return g != T(0) ? alpha * rectified(g) : T(0);
}

// A channel's weight. gradient: where it is the same at every position; sum: of the gradients, of their
// products with activations, or of gradcam++'s terms; activation_sum: where the method has one.
template <typename T>
__device__ __forceinline__ T channel_weight(const CamPlan& plan, T gradient, T sum, T activation_sum) {
    const T positions = static_cast<T>(plan.positions);
    if (plan.weights == CamWeights::mean) return sum / positions;
    if (plan.weights == CamWeights::cross)
        return (plan.constant ? gradient * activation_sum : sum) / (activation_sum + static_cast<T>(1e-7));
    return plan.constant ? positions * plus_plus_term(gradient, activation_sum) : sum;
}

// Sums over channels: of term(channel, position, a[channel, position]), into the map of the tile. Threads
// take kLines lines at a time, a line being a position and one of the groups that share its channels.
template <typename E, int kLines, typename Term>
__device__ __forceinline__ void pool_lines(const CamPlan& plan, const CamTile& a, const CamRegion& region,
                                           bool add, Accumulator<E>* map, Term term) {
    using T = Accumulator<E>;
    const CamLanes lanes(plan.pool_lanes, true);
    const int total = plan.pool_groups * region.positions, step = plan.pool_groups << lanes.log;
    for (int start = 0; start < total; start += kLines * lanes.lines) {
        T sum[kLines];
        int position[kLines], offset[kLines];
        int group = 0;
#pragma unroll
        for (int k = 0; k < kLines; ++k) {
            // Lines after the last do its work once more, for nothing.
            const int line = min(start + lanes.first + k * lanes.lines, total - 1);
            if (kLines == 1) group = plan.pool_groups > 1 ? line / region.positions : 0;
            position[k] = line - group * region.positions;
            offset[k] = position[k] * a.position;
            sum[k] = 0;
        }
        const int begin = (group << lanes.log) + lanes.lane;
        const E* p = shared_at<E>(0) + a.start;
        if constexpr (kLines == 1) {
            sum[0] = sum_terms<T>(begin, step, region.channels, [&](int c) {
                return term(c, position[0], widen(p[offset[0] + c * a.channel]));
            });
        } else {
            for (int c = begin; c < region.channels; c += step) {
#pragma unroll
                for (int k = 0; k < kLines; ++k)
                    sum[k] += term(c, position[k], widen(p[offset[k] + c * a.channel]));
            }
        }
#pragma unroll
        for (int k = 0; k < kLines; ++k) {
            sum[k] = lanes.sum(sum[k]);
            const int line = start + lanes.first + k * lanes.lines;
            if (lanes.lane == 0 && line < total) map[line] = add ? map[line] + sum[k] : sum[k];
        }
    }
}

template <typename E, typename Term>
__device__ __forceinline__ void pool(const CamPlan& plan, const CamTile& a, const CamRegion& region, bool add,
                                     Accumulator<E>* map, Term term) {
    constexpr int kTogether = 4;
    if (plan.pool_groups == 1 && region.positions << plan.pool_lanes > 2 * kCamThreads)
        pool_lines<E, kTogether>(plan, a, region, add, map, term);
    else
        pool_lines<E, 1>(plan, a, region, add, map, term);
}

}  // namespace diffcam
