// Maps of planes so short that a map stays in registers while the channels pass by. One target.
#pragma once

#include "cpu/cam.h"
#include "cpu/cam_group.h"
#include "cpu/cam_sums.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

constexpr int kMapVectors = 12;  // of a map in registers, beside those of its last, partial group

// A chain of thousands of additions rounds away what a map of little range consists of.
constexpr int64_t kChain = 128;

template <typename E>
DIFFCAM_INLINE int64_t map_vectors(int64_t positions) {
    return positions / Group<E>::kSize * Group<E>::kVectors;
}

template <typename E>
bool fits_short_planes(int64_t positions) {
    return map_vectors<E>(positions) <= kMapVectors;
}

// Calls body(full groups of a plane, whether there is a partial one), both constants, for planes that fit.
template <typename E, int kMost, int kGroups = 0, typename Body>
DIFFCAM_INLINE void with_groups(int64_t positions, const Body& body) {
    if constexpr (kGroups * Group<E>::kVectors <= kMost) {
        if (positions / Group<E>::kSize != kGroups)
            with_groups<E, kMost, kGroups + 1>(positions, body);
        else if (positions % Group<E>::kSize == 0)
            body(Constant<kGroups>{}, Constant<false>{});
        else
            body(Constant<kGroups>{}, Constant<true>{});
    }
}

// Calls body(first channel, channels) for chains of channels.
template <typename Body>
DIFFCAM_INLINE void for_chains(int64_t channels, const Body& body) {
    for (int64_t c = 0; c < channels; c += kChain) body(c, channels - c < kChain ? channels - c : kChain);
}

// A map in registers. n: positions of the partial group.
template <int kGroups, bool kTail, typename E>
struct ShortMap {
    Group<E> total[kGroups + 1] = {};

    static DIFFCAM_INLINE Group<E> group(const E* row, int i, int n) {
        return i < kGroups ? load_group(row + i * Group<E>::kSize)
                           : load_group_first(row + i * Group<E>::kSize, n);
    }

    DIFFCAM_INLINE void add(const E* row, Vec<Accumulator<E>> weight, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < kGroups + kTail; ++i) {
            const Group<E> x = group(row, i, n);
            for (int v = 0; v < Group<E>::kVectors; ++v)
                total[i].part[v] = fma(weight, x.part[v], total[i].part[v]);
        }
    }

    // Puts the totals into the map, or adds them to it, and starts from zero.
    DIFFCAM_INLINE void flush(Accumulator<E>* map, int n, bool accumulate) {
        constexpr int kSize = Group<E>::kSize;
#pragma GCC unroll 16
        for (int i = 0; i < kGroups; ++i)
            store_arranged<true, E>(map + i * kSize, total[i], kSize, accumulate);
        if (kTail) store_arranged<false, E>(map + kGroups * kSize, total[kGroups], n, accumulate);
#pragma GCC unroll 16
        for (int i = 0; i < kGroups + 1; ++i) total[i] = {};
    }
};

template <typename E>
DIFFCAM_INLINE int partial_group(int64_t positions) {
    return static_cast<int>(positions % Group<E>::kSize);
}

// From weights.

template <int kGroups, bool kTail, typename E>
void add_short_planes_of(const E* a, int64_t stride, const Accumulator<E>* weights, int64_t channels, int n,
                         bool accumulate, Accumulator<E>* map) {
    ShortMap<kGroups, kTail, E> total;
    for (int64_t c = 0; c < channels; ++c) total.add(a + c * stride, broadcast(weights[c]), n);
    total.flush(map, n, accumulate);
}

template <typename E>
void add_short_planes(const E* a, int64_t stride, const Accumulator<E>* weights, int64_t channels,
                      int64_t positions, bool accumulate, Accumulator<E>* map) {
    with_groups<E, kMapVectors>(positions, [&](auto groups, auto tail) {
        for_chains(channels, [&](int64_t c, int64_t count) {
            add_short_planes_of<decltype(groups)::kValue, decltype(tail)::kValue>(
                a + c * stride, stride, weights + c, count, partial_group<E>(positions), accumulate || c > 0,
                map);
        });
    });
}

// From products.

template <CamMethod kMethod, typename T>
DIFFCAM_INLINE Vec<T> add_product(Vec<T> total, Vec<T> a, Vec<T> g) {
    if constexpr (kMethod == CamMethod::hirescam) return fma(g, a, total);
    if constexpr (kMethod == CamMethod::layercam) return fma(relu(g), a, total);
    return total + relu(g * a);
}

template <CamMethod kMethod, int kGroups, bool kTail, typename E>
void multiply_short_planes_of(const E* a, int64_t a_stride, const E* g, int64_t g_stride, int64_t channels,
                              int n, bool accumulate, Accumulator<E>* map) {
    ShortMap<kGroups, kTail, E> sums;
    for (int64_t c = 0; c < channels; ++c, a += a_stride, g += g_stride) {
#pragma GCC unroll 16
        for (int i = 0; i < kGroups + kTail; ++i) {
            const Group<E> x = sums.group(a, i, n), y = sums.group(g, i, n);
            for (int v = 0; v < Group<E>::kVectors; ++v)
                sums.total[i].part[v] =
                    add_product<kMethod, Accumulator<E>>(sums.total[i].part[v], x.part[v], y.part[v]);
        }
    }
    sums.flush(map, n, accumulate);
}

template <CamMethod kMethod, typename E>
void multiply_short_planes(const E* a, int64_t a_stride, const E* g, int64_t g_stride, int64_t channels,
                           int64_t positions, bool accumulate, Accumulator<E>* map) {
    with_groups<E, kMapVectors>(positions, [&](auto groups, auto tail) {
        for_chains(channels, [&](int64_t c, int64_t count) {
            multiply_short_planes_of<kMethod, decltype(groups)::kValue, decltype(tail)::kValue>(
                a + c * a_stride, a_stride, g + c * g_stride, g_stride, count, partial_group<E>(positions),
                accumulate || c > 0, map);
        });
    });
}

// From gradients: sums and the map in one go.

// gradcam++ needs more registers beside its map, and reads activations twice, some 32 planes later: from the
// first-level cache.
constexpr int kPlusPlusVectors = 7;
constexpr int64_t kPlusPlusBytes = 256;

template <CamMethod kMethod>
constexpr int kMostJoined = kMethod == CamMethod::gradcam ? kMapVectors : kPlusPlusVectors;

// Short vectors leave no registers over; float64 is for checking, not for speed.
template <typename E>
constexpr bool kJoins = kVectorBytes >= 32 && sizeof(E) < sizeof(double);

template <typename E>
bool joins_short_planes(CamMethod method, int64_t positions) {
    if (!kJoins<E>) return false;
    const int64_t vectors = map_vectors<E>(positions);
    if (method == CamMethod::gradcam) return vectors <= kMostJoined<CamMethod::gradcam>;
    return method == CamMethod::gradcam_plus_plus && vectors <= kMostJoined<CamMethod::gradcam_plus_plus> &&
           positions * static_cast<int64_t>(sizeof(E)) <= kPlusPlusBytes;
}

// Blocks of channels pass through stages, one block behind the other: for gradcam++ sums of activations,
// then sums of gradients, then the map. In a step every stage takes a row in turn, so that rows of both
// tensors are on their way from memory at the same time.
template <CamMethod kMethod, int kGroups, typename E>
void join_short_planes_of(const E* a, int64_t a_stride, const E* g, int64_t g_stride, int64_t channels,
                          int64_t positions, Accumulator<E>* map) {
    using T = Accumulator<E>;
    constexpr int kLanes = Vec<T>::kLanes;
    static_assert(kChain % kLanes == 0, "a chain ends with a block");
    constexpr bool kPlusPlus = kMethod == CamMethod::gradcam_plus_plus;
    constexpr CamSum kSum = kPlusPlus ? CamSum::plus_plus : CamSum::plain;
    const int n = partial_group<E>(positions);
    const auto rows_of = [&](int64_t block) {
        const int64_t left = channels - block * kLanes;
        return static_cast<int>(block < 0 || left < 0 ? 0 : left < kLanes ? left : kLanes);
    };
    ShortMap<kGroups, true, E> total;
    T weights[kLanes] = {}, activation_sums[kLanes] = {};
    bool accumulate = false;
    const int64_t blocks = (channels + kLanes - 1) / kLanes;
    for (int64_t step = 0; step <= blocks + kPlusPlus; ++step) {
        const int64_t summed = step - kPlusPlus, weighted = summed - 1;
        const int rows[3] = {kPlusPlus ? rows_of(step) : 0, rows_of(summed), rows_of(weighted)};
        const E* first = a + step * kLanes * a_stride;
        const E* second = g + summed * kLanes * g_stride;
        const E* third = a + weighted * kLanes * a_stride;
        Vec<T> sums[kLanes], gradient_sums[kLanes], unused;
        for (int r = 0; r < kLanes; ++r) {
            if (r < rows[0])
                sum_row<CamSum::plain, kGroups>(first + r * a_stride, first, zero<T>(), positions, &sums[r],
                                                &unused);
            else if (kPlusPlus)
                sums[r] = zero<T>();
            if (r < rows[1])
                sum_row<kSum, kGroups>(second + r * g_stride, second, broadcast(activation_sums[r]),
                                       positions, &gradient_sums[r], &unused);
            else
                gradient_sums[r] = zero<T>();
            if (r < rows[2]) total.add(third + r * a_stride, broadcast(weights[r]), n);
        }
        Vec<T> next = sum_each(gradient_sums);
        if (!kPlusPlus) next = next / broadcast(static_cast<T>(positions));
        store(weights, next);
        if (kPlusPlus) store(activation_sums, sum_each(sums));
        if (weighted >= 0 && ((weighted + 1) * kLanes % kChain == 0 || weighted + 1 == blocks)) {
            total.flush(map, n, accumulate);
            accumulate = true;
        }
    }
}

template <CamMethod kMethod, typename E>
void join_short_planes(const E* a, int64_t a_stride, const E* g, int64_t g_stride, int64_t channels,
                       int64_t positions, Accumulator<E>* map) {
    if constexpr (kJoins<E>)
        with_groups<E, kMostJoined<kMethod>>(positions, [&](auto groups, auto) {
            join_short_planes_of<kMethod, decltype(groups)::kValue>(a, a_stride, g, g_stride, channels,
                                                                    positions, map);
        });
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
