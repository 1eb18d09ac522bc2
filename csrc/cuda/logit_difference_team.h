// The threads that share a row of logits (a warp, a block, or a cluster of blocks), and how they walk their
// part of it.
#pragma once

#include "elements.h"

namespace diffcam {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr int kMostThreads = 512;  // of a block
constexpr int kMostWarps = kMostThreads / kWarp;

template <typename T>
struct Pair {
    T first;
    T second;
};

template <typename T>
__device__ __forceinline__ T across_lanes(T value, int distance) {
    return __shfl_xor_sync(kAllLanes, value, distance);
}
template <typename T>
__device__ __forceinline__ Pair<T> across_lanes(Pair<T> value, int distance) {
    return {across_lanes(value.first, distance), across_lanes(value.second, distance)};
}

// Over neighbouring lanes, a power of two of them. Each gets the same bits: both partners of an exchange
// combine the same two values.
template <typename V, typename Combine>
__device__ __forceinline__ V reduce_lanes(V value, int lanes, Combine combine) {
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        value = combine(value, across_lanes(value, distance));
    }
    return value;
}

struct Team {
    static constexpr int kSlotBytes = 16;
    static constexpr int kSlotsBytes = 2 * (kMostWarps + 1) * kSlotBytes;

    int thread;            // the calling thread among those of its block
    int threads;           // of the block, a power of two
    unsigned rank;         // the calling thread's block among those of the cluster
    unsigned blocks;       // of the cluster, a power of two
    unsigned char* slots;  // shared memory, kSlotsBytes
    unsigned turn;         // of the two halves of the slots, or of any memory that takes turns

    // A barrier of the team's threads in this block.
    __device__ __forceinline__ void sync() const {
        if (threads == kWarp) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }

    // A barrier of all the team's threads.
    __device__ __forceinline__ void sync_all() const {
        if (blocks > 1) {
            cluster_sync();
        } else {
            sync();
        }
    }

    // Where the first block of the cluster has what is at this place of the calling block's shared memory.
    template <typename T>
    __device__ __forceinline__ T* in_first_block(T* shared) const {
        return blocks > 1 ? cluster_peer(shared, 0) : shared;
    }

    // Combines one value a thread, in a fixed order; every thread gets the result. Slots take turns: those of
    // one reduction are written again only after the barrier of the next, which all have then left.
    template <typename V, typename Combine>
    __device__ __forceinline__ V reduce(V value, Combine combine) {
        static_assert(sizeof(V) <= kSlotBytes, "a slot holds it");
        value = reduce_lanes(value, kWarp, combine);
        if (threads == kWarp && blocks == 1) return value;
        const int lane = thread % kWarp, warps = threads / kWarp;
        V* slot = reinterpret_cast<V*>(slots + (turn++ & 1) * (kSlotsBytes / 2));
        if (lane == 0) slot[thread / kWarp] = value;
        sync();
        value = reduce_lanes(slot[lane % warps], warps, combine);
        if (blocks == 1) return value;
        V* of_block = slot + kMostWarps;
        if (thread == 0) *of_block = value;
        cluster_sync();
        return reduce_lanes(*cluster_peer(of_block, static_cast<unsigned>(lane) % blocks),
                            static_cast<int>(blocks), combine);
    }
};

// A block's part of a row: in its shared memory, or where the row is, with a stride between elements. It is
// walked in groups, which are such that a full group of results is a 16-byte store.
template <typename E, bool kShared>
struct Slice {
    using T = Accumulator<E>;
    static constexpr int kGroup = 16 / static_cast<int>(sizeof(T));

    const E* data;  // element 0
    int first;      // class of element 0
    int count;
    int shift;       // elements that the first group lacks
    int64_t stride;  // 1 in shared memory
    bool wide;       // a full group is one aligned access; always in shared memory

    __device__ __forceinline__ T at(int i) const { return widen(kShared ? data[i] : data[i * stride]); }

    // Calls body(first element, values, bits of those that exist) for the calling thread's groups.
    template <typename Body>
    __device__ __forceinline__ void for_groups(const Team& team, Body body) const {
        const int groups = (count + shift + kGroup - 1) / kGroup;
#pragma unroll 1
        for (int group = team.thread; group < groups; group += team.threads) {
            const int begin = group * kGroup - shift;
            const bool full = begin >= 0 && begin + kGroup <= count;
            T x[kGroup];
            unsigned inside = (1u << kGroup) - 1;
            if (full && (kShared || wide)) {
                const auto pack = *reinterpret_cast<const Pack<E, kGroup>*>(data + begin);
#pragma unroll
                for (int j = 0; j < kGroup; ++j) x[j] = widen(pack.element[j]);
            } else {
                inside = 0;
#pragma unroll
                for (int j = 0; j < kGroup; ++j) {
                    const int i = begin + j;
                    const bool exists = i >= 0 && i < count;
                    x[j] = exists ? at(i) : T(0);
                    inside |= static_cast<unsigned>(exists) << j;
                }
            }
            body(begin, x, inside);
        }
    }

    // Calls body(element, value) for the calling thread's elements.
    template <typename Body>
    __device__ __forceinline__ void for_all(const Team& team, Body body) const {
        for_groups(team, [&](int begin, const T* x, unsigned inside) {
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                if ((inside >> j & 1) != 0) body(begin + j, x[j]);
            }
        });
    }

    // The same but for one class.
    template <typename Body>
    __device__ __forceinline__ void for_rivals(const Team& team, int chosen, Body body) const {
        for_groups(team, [&](int begin, const T* x, unsigned inside) {
            const unsigned rivals = inside & ~bit_of(chosen, begin);
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                if ((rivals >> j & 1) != 0) body(begin + j, x[j]);
            }
        });
    }

    // A group's bit for a class, 0 where the class is not in the group.
    __device__ __forceinline__ unsigned bit_of(int chosen, int begin) const {
        const unsigned at = static_cast<unsigned>(chosen - first - begin);
        return at < kGroup ? 1u << at : 0;
    }
};

// Copies a slice to shared memory, which has room for it and 32 bytes more, 16-byte aligned. Returns where it
// is then; to be used after a barrier of the block.
template <typename E>
__device__ __forceinline__ Slice<E, true> stage(const Team& team, const Slice<E, false>& from,
                                                unsigned char* shared) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(E));
    E* to = reinterpret_cast<E*>(shared);
    if (from.wide) {
        // Aligned in shared memory as it is in global memory.
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from.data) % 16 / sizeof(E));
        to += shift;
        const int vectors = (from.count + shift + kVector - 1) / kVector;
#pragma unroll 1
        for (int vector = team.thread; vector < vectors; vector += team.threads) {
            const int begin = vector * kVector - shift;
            if (begin >= 0 && begin + kVector <= from.count) {
                copy_async_16(to + begin, from.data + begin);
            } else {
#pragma unroll 1
                for (int i = max(begin, 0); i < min(begin + kVector, from.count); ++i) to[i] = from.data[i];
            }
        }
        copy_async_commit();
        copy_async_wait<0>();
    } else {
        to += from.shift;
#pragma unroll 4
        for (int i = team.thread; i < from.count; i += team.threads) to[i] = from.data[i * from.stride];
    }
    return {to, from.first, from.count, from.shift, 1, true};
}

}  // namespace diffcam
