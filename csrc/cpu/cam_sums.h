// Sums over the positions of each channel, in both layouts.
#pragma once

#include "cpu/cam.h"
#include "cpu/cam_group.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

template <CamSum kKind, typename T>
DIFFCAM_INLINE Vec<T> add_term(Vec<T> total, Vec<T> x, Vec<T> y, Vec<T> activation_sum) {
    if constexpr (kKind == CamSum::plain) return total + x;
    if constexpr (kKind == CamSum::product) return fma(x, y, total);
    const Vec<T> square = x * x;
    const Vec<T> denominator =
        fma(activation_sum * x, square, fma(broadcast(T(2)), square, broadcast(static_cast<T>(1e-6))));
    return fma(where_nonzero(x, square / denominator), relu(x), total);
}

// Fetches a line into the second-level cache: what is read next, while other memory is summed. A plain sum
// does not read y, and fetches it where it is another tensor than x.
constexpr int kLine = 64;
DIFFCAM_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <CamSum kKind, typename T>
DIFFCAM_INLINE Vec<T> first_term(Vec<T> x, Vec<T> y, Vec<T> activation_sum) {
    if constexpr (kKind == CamSum::plain) return x;
    if constexpr (kKind == CamSum::product) return x * y;
    return add_term<kKind>(zero<T>(), x, y, activation_sum);
}

// The sums of one row, one vector each. kGroups: how many full groups a row has, or -1 for any number.
template <CamSum kKind, int kGroups, typename E, typename T>
DIFFCAM_INLINE void sum_row(const E* x, const E* y, Vec<T> activation_sum, int64_t positions, Vec<T>* total,
                            Vec<T>* plain) {
    constexpr int kSize = Group<E>::kSize, kVectors = Group<E>::kVectors;
    constexpr int kChains = 4;  // independent additions, so that none waits for the one before
    constexpr bool kProduct = kKind == CamSum::product;
    Vec<T> totals[kChains], plains[kChains];
    // A chain starts with its first term, not with zero plus its first term.
    const auto add = [&](auto full, auto first, int slot, int64_t s, int n) {
        const Group<E> a = load_part<decltype(full)::kValue>(x + s, n);
        const Group<E> b = kKind == CamSum::product ? load_part<decltype(full)::kValue>(y + s, n) : a;
        for (int v = 0; v < kVectors; ++v) {
            const int i = (slot * kVectors + v) % kChains;
            const bool starts = decltype(first)::kValue && slot * kVectors + v < kChains;
            totals[i] = starts ? first_term<kKind>(a.part[v], b.part[v], activation_sum)
                               : add_term<kKind>(totals[i], a.part[v], b.part[v], activation_sum);
            if constexpr (kProduct) plains[i] = starts ? a.part[v] : plains[i] + a.part[v];
        }
    };
    if constexpr (kGroups >= 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kGroups; ++i) add(Constant<true>{}, Constant<true>{}, i, i * kSize, kSize);
        add(Constant<false>{}, Constant<true>{}, kGroups, kGroups * kSize,
            static_cast<int>(positions - kGroups * kSize));
        constexpr int kUsed = (kGroups + 1) * kVectors;
        *total = totals[0];
        if constexpr (kProduct) *plain = plains[0];
#pragma GCC unroll 4
        for (int i = 1; i < (kUsed < kChains ? kUsed : kChains); ++i) {
            *total = *total + totals[i];
            if constexpr (kProduct) *plain = *plain + plains[i];
        }
        return;
    }
    for (int i = 0; i < kChains; ++i) {
        totals[i] = zero<T>();
        if constexpr (kProduct) plains[i] = zero<T>();
    }
    int64_t s = 0;
    for (; s + 4 * kSize <= positions; s += 4 * kSize) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(Constant<true>{}, Constant<false>{}, i, s + i * kSize, kSize);
    }
    for (; s + kSize <= positions; s += kSize) add(Constant<true>{}, Constant<false>{}, 0, s, kSize);
    if (s < positions) add(Constant<false>{}, Constant<false>{}, 1, s, static_cast<int>(positions - s));
    *total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    if constexpr (kProduct) *plain = (plains[0] + plains[1]) + (plains[2] + plains[3]);
}

template <CamSum kKind, int kGroups, typename E>
void sum_planes(const CamTile& x_tile, const CamTile& y_tile, const Accumulator<E>* activation_sums,
                int64_t channels, int64_t positions, bool accumulate, Accumulator<E>* sums,
                Accumulator<E>* plain_sums) {
    using T = Accumulator<E>;
    constexpr int kLanes = Vec<T>::kLanes;
    const E* x = static_cast<const E*>(x_tile.data);
    const E* y = static_cast<const E*>(kKind == CamSum::product ? y_tile.data : x_tile.data);
    const int64_t x_stride = x_tile.channel_stride;
    const int64_t y_stride = kKind == CamSum::product ? y_tile.channel_stride : x_stride;
    const E* next =
        kKind == CamSum::plain && y_tile.data != x_tile.data ? static_cast<const E*>(y_tile.data) : nullptr;
    for (int64_t c = 0; c < channels; c += kLanes) {
        const int rows = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
        Vec<T> total[kLanes], plain[kLanes];
        for (int r = 0; r < rows; ++r) {
            if (kGroups < 0 && next != nullptr) {
                const E* row = next + (c + r) * y_tile.channel_stride;
                for (int64_t s = 0; s < positions; s += kLine / static_cast<int>(sizeof(E))) fetch(row + s);
            }
            const Vec<T> parameter =
                kKind == CamSum::plus_plus ? broadcast(activation_sums[c + r]) : zero<T>();
            sum_row<kKind, kGroups>(x + (c + r) * x_stride, y + (c + r) * y_stride, parameter, positions,
                                    &total[r], &plain[r]);
        }
        for (int r = rows; r < kLanes; ++r) total[r] = plain[r] = zero<T>();
        store_row_sums(sums + c, total, rows, accumulate);
        if (kKind == CamSum::product && plain_sums != nullptr)
            store_row_sums(plain_sums + c, plain, rows, accumulate);
    }
}

// kRows positions, `step` apart, and one group of channels. kFetch: y is fetched, not read.
template <CamSum kKind, int kRows, bool kFetch, bool kFull, typename E>
DIFFCAM_INLINE void sum_column_group(const E* x, int64_t x_step, const E* y, int64_t y_step,
                                     const Accumulator<E>* activation_sums, int n, bool accumulate,
                                     Accumulator<E>* sums, Accumulator<E>* plain_sums) {
    using T = Accumulator<E>;
    Group<E> total = {}, plain = {}, parameter = {};
    if constexpr (kKind == CamSum::plus_plus) parameter = load_arranged<kFull, E>(activation_sums, n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const Group<E> a = load_part<kFull>(x + r * x_step, n);
        const Group<E> b = kKind == CamSum::product ? load_part<kFull>(y + r * y_step, n) : a;
        if constexpr (kFetch) fetch(y + r * y_step);
        for (int v = 0; v < Group<E>::kVectors; ++v) {
            total.part[v] = add_term<kKind, T>(total.part[v], a.part[v], b.part[v], parameter.part[v]);
            if constexpr (kKind == CamSum::product) plain.part[v] = plain.part[v] + a.part[v];
        }
    }
    store_arranged<kFull, E>(sums, total, n, accumulate);
    if (kKind == CamSum::product && plain_sums != nullptr)
        store_arranged<kFull, E>(plain_sums, plain, n, accumulate);
}

template <CamSum kKind, int kRows, bool kFetch, typename E>
void sum_column_rows(const E* x, int64_t x_step, const E* y, int64_t y_step,
                     const Accumulator<E>* activation_sums, int64_t channels, bool accumulate,
                     Accumulator<E>* sums, Accumulator<E>* plain_sums) {
    constexpr int kSize = Group<E>::kSize;
    const auto add = [&](auto full, int64_t c, int n) {
        sum_column_group<kKind, kRows, kFetch, decltype(full)::kValue>(
            x + c, x_step, y + c, y_step, kKind == CamSum::plus_plus ? activation_sums + c : nullptr, n,
            accumulate, sums + c, plain_sums == nullptr ? nullptr : plain_sums + c);
    };
    int64_t c = 0;
    for (; c + kSize <= channels; c += kSize) add(Constant<true>{}, c, kSize);
    if (c < channels) add(Constant<false>{}, c, static_cast<int>(channels - c));
}

template <CamSum kKind, bool kFetch, typename E>
void sum_columns(const CamTile& x_tile, const CamTile& y_tile, const Accumulator<E>* activation_sums,
                 int64_t channels, int64_t positions, bool accumulate, Accumulator<E>* sums,
                 Accumulator<E>* plain_sums) {
    constexpr bool kReads = kKind == CamSum::product || kFetch;
    const E* x = static_cast<const E*>(x_tile.data);
    const E* y = static_cast<const E*>(kReads ? y_tile.data : x_tile.data);
    const int64_t x_stride = x_tile.position_stride;
    const int64_t y_stride = kReads ? y_tile.position_stride : x_stride;
    int64_t s = 0;
    const auto in_rows_of = [&](auto rows) {
        const int64_t apart = (positions - s) / decltype(rows)::kValue, end = s + apart;
        for (; s < end; ++s, accumulate = true)
            sum_column_rows<kKind, decltype(rows)::kValue, kFetch>(
                x + s * x_stride, apart * x_stride, y + s * y_stride, apart * y_stride, activation_sums,
                channels, accumulate, sums, plain_sums);
        s += apart * (decltype(rows)::kValue - 1);
    };
    if (kKind == CamSum::plain && is_long_row<E>(channels)) in_rows_of(Constant<8>{});
    in_rows_of(Constant<4>{});
    in_rows_of(Constant<2>{});
    in_rows_of(Constant<1>{});
}

template <CamSum kKind, typename E>
void sum_tile(const CamTile& x, const CamTile& y, const Accumulator<E>* activation_sums, int64_t channels,
              int64_t positions, bool accumulate, Accumulator<E>* sums, Accumulator<E>* plain_sums) {
    if (!x.planar) {
        if constexpr (kKind == CamSum::plain) {
            if (y.data != nullptr && y.data != x.data)
                return sum_columns<kKind, true, E>(x, y, activation_sums, channels, positions, accumulate,
                                                   sums, plain_sums);
        }
        return sum_columns<kKind, false, E>(x, y, activation_sums, channels, positions, accumulate, sums,
                                            plain_sums);
    }
    const auto planes = [&](auto groups) {
        sum_planes<kKind, decltype(groups)::kValue, E>(x, y, activation_sums, channels, positions, accumulate,
                                                       sums, plain_sums);
    };
    switch (positions / Group<E>::kSize) {
        case 0:
            return planes(Constant<0>{});
        case 1:
            return planes(Constant<1>{});
        case 2:
            return planes(Constant<2>{});
        case 3:
            return planes(Constant<3>{});
        case 4:
            return planes(Constant<4>{});
        default:
            return planes(Constant<-1>{});
    }
}

template <typename E>
void channel_sums(CamSum kind, const CamTile& x, const CamTile& y, const void* activation_sums_,
                  int64_t channels, int64_t positions, bool accumulate, void* sums_, void* plain_sums_) {
    using T = Accumulator<E>;
    const T* activation_sums = static_cast<const T*>(activation_sums_);
    T* sums = static_cast<T*>(sums_);
    T* plain_sums = static_cast<T*>(plain_sums_);
    switch (kind) {
        case CamSum::plain:
            return sum_tile<CamSum::plain, E>(x, y, activation_sums, channels, positions, accumulate, sums,
                                              plain_sums);
        case CamSum::product:
            return sum_tile<CamSum::product, E>(x, y, activation_sums, channels, positions, accumulate, sums,
                                                plain_sums);
        case CamSum::plus_plus:
            return sum_tile<CamSum::plus_plus, E>(x, y, activation_sums, channels, positions, accumulate,
                                                  sums, plain_sums);
    }
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
