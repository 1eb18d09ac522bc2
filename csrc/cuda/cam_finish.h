// From raw maps to finished ones: ReLU and normalisation.
#pragma once

#include "cam_sums.h"

namespace diffcam {

template <typename T>
struct CamExtremes {
    T low, high;

    // NaN wins, as in torch.amin and torch.amax.
    __device__ __forceinline__ void add(T other_low, T other_high) {
        low = low < other_low || low != low ? low : other_low;
        high = high > other_high || high != high ? high : other_high;
    }
};

// The extremes of all that the threads of a block have seen, in thread 0. memory: as many pairs as warps.
template <typename T>
__device__ __forceinline__ CamExtremes<T> block_extremes(CamExtremes<T> seen, CamExtremes<T>* memory) {
    for (int distance = 16; distance > 0; distance /= 2)
        seen.add(__shfl_xor_sync(~0u, seen.low, distance), __shfl_xor_sync(~0u, seen.high, distance));
    if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = seen;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kCamWarps; ++warp) seen.add(memory[warp].low, memory[warp].high);
    return seen;
}

// Finishes positions [begin, end) of a map. raw(s) is called once for each, keep(s, value) says where a value
// waits for the extremes of the whole map, kept(s) returns it; the same thread calls all three for a
// position. Blocks of a cluster finish a part of the map each. Nobody may leave before all have seen the
// extremes.
template <typename T, typename Raw, typename Keep, typename Kept>
__device__ __forceinline__ void finish_map(const CamPlan& plan, int cluster, CamExtremes<T>* memory,
                                           int begin, int end, T* map, Raw raw, Keep keep, Kept kept) {
    CamExtremes<T> extremes = {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)};
    const bool normalizes = plan.normalize != Normalization::none;
    for (int s = begin + static_cast<int>(threadIdx.x); s < end; s += kCamThreads) {
        T value = raw(s);
        if (plan.relu) value = rectified(value);
        if (normalizes) {
            extremes.add(value, value);
            keep(s, value);
        } else {
            map[s] = value;
        }
    }
    if (!normalizes) return;
    extremes = block_extremes(extremes, memory + 1);
    if (threadIdx.x == 0) memory[0] = extremes;
    if (cluster > 1)
        cluster_sync();
    else
        __syncthreads();
    extremes = memory[0];
    for (int rank = 0; cluster > 1 && rank < cluster; ++rank) {
        const CamExtremes<T> other = *cluster_peer(memory, rank);
        extremes.add(other.low, other.high);
    }
    const T shift = plan.normalize == Normalization::minmax ? extremes.low : T(0);
    const T range = extremes.high - shift + static_cast<T>(plan.eps);
    for (int s = begin + static_cast<int>(threadIdx.x); s < end; s += kCamThreads)
        map[s] = (kept(s) - shift) / range;
}

}  // namespace diffcam
