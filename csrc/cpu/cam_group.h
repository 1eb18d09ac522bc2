// What one load of elements brings, whatever their type.
#pragma once

#include "cpu/cam.h"
#include "cpu/simd.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

template <auto value>
struct Constant {
    static constexpr auto kValue = value;
};

// The elements that one load brings. bfloat16 comes in pairs: places 0 2 4 ... in one vector, 1 3 5 ... in
// the other.
template <typename E>
struct Group {
    static constexpr int kVectors = 1;
    static constexpr int kSize = Vec<Accumulator<E>>::kLanes;
    Vec<Accumulator<E>> part[1];
};
template <>
struct Group<BFloat16> {
    static constexpr int kVectors = 2;
    static constexpr int kSize = 2 * Vec<float>::kLanes;
    Vec<float> part[2];
};

// Whether a row of channels is worth eight runs through memory at a time: of shorter ones four are faster.
template <typename E>
DIFFCAM_INLINE bool is_long_row(int64_t channels) {
    return channels * static_cast<int64_t>(sizeof(E)) >= kLongRow;
}

template <typename E>
DIFFCAM_INLINE Group<E> load_group(const E* p) {
    return {{load(p)}};
}
template <>
DIFFCAM_INLINE Group<BFloat16> load_group(const BFloat16* p) {
    Group<BFloat16> x;
    load_pairs(p, &x.part[0], &x.part[1]);
    return x;
}
template <typename E>
DIFFCAM_INLINE Group<E> load_group_first(const E* p, int n) {
    return {{load_first(p, n)}};
}
template <>
DIFFCAM_INLINE Group<BFloat16> load_group_first(const BFloat16* p, int n) {
    Group<BFloat16> x;
    load_pairs_first(p, n, &x.part[0], &x.part[1]);
    return x;
}
// n elements, all of a group where kFull.
template <bool kFull, typename E>
DIFFCAM_INLINE Group<E> load_part(const E* p, int n) {
    if constexpr (kFull) return load_group(p);
    return load_group_first(p, n);
}

// Accumulators in their natural order, arranged as a group of E is.
template <bool kFull, typename E>
DIFFCAM_INLINE Group<E> load_arranged(const Accumulator<E>* p, int n) {
    if constexpr (Group<E>::kVectors == 1) {
        return {{kFull ? load(p) : load_first(p, n)}};
    } else {
        constexpr int kLanes = Vec<float>::kLanes;
        const int low = n < kLanes ? n : kLanes;
        const Vec<float> first = kFull ? load(p) : load_first(p, low);
        const Vec<float> second = kFull ? load(p + kLanes) : load_first(p + low, n - low);
        Group<E> x;
        deinterleave(first, second, &x.part[0], &x.part[1]);
        return x;
    }
}
template <bool kFull, typename E>
DIFFCAM_INLINE void store_arranged(Accumulator<E>* p, Group<E> x, int n, bool accumulate) {
    using T = Accumulator<E>;
    constexpr int kLanes = Vec<T>::kLanes;
    if constexpr (Group<E>::kVectors == 2) interleave(x.part[0], x.part[1], &x.part[0], &x.part[1]);
    for (int v = 0; v < Group<E>::kVectors; ++v) {
        if constexpr (kFull) {
            store(p, accumulate ? load(p) + x.part[v] : x.part[v]);
        } else {
            const int m = n < kLanes ? n : kLanes;
            store_first(p, accumulate ? load_first(p, m) + x.part[v] : x.part[v], m);
            n -= m;
        }
        p += kLanes;
    }
}

// A vector of the results for `count` rows, from one vector of partial sums for each row.
template <typename T>
DIFFCAM_INLINE void store_row_sums(T* p, const Vec<T>* rows, int64_t count, bool accumulate) {
    Vec<T> sums = sum_each(rows);
    if (count >= Vec<T>::kLanes) {
        store(p, accumulate ? load(p) + sums : sums);
    } else {
        const int n = static_cast<int>(count);
        store_first(p, accumulate ? load_first(p, n) + sums : sums, n);
    }
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
