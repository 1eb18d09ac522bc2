// The first rivals of a row in order: a radix selection, which finds the last of them from counts of digits,
// and a sort of those that are selected.
#pragma once

#include "logit_difference_team.h"

namespace diffcam {

template <typename T>
struct KeyOf {
    using type = uint32_t;
};
template <>
struct KeyOf<double> {
    using type = uint64_t;
};
template <typename T>
using Key = typename KeyOf<T>::type;

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t bits_of(double x) {
    return static_cast<uint64_t>(__double_as_longlong(x));
}
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double from_bits(uint64_t bits) {
    return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// Larger numbers have larger keys; both zeros have the same, and NaN the largest.
template <typename T>
__device__ __forceinline__ Key<T> ascending_key(T x) {
    constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
    if (x != x) return ~Key<T>(0);
    const Key<T> bits = bits_of(x + T(0));
    return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

template <typename T>
__device__ __forceinline__ T number_of(Key<T> key) {
    constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
    return from_bits((key & kSign) != 0 ? key & ~kSign : ~key);
}

// A class in an order in which no two are equal: by descending key, then by descending `late`, which is 0 for
// the last class.
template <typename T>
struct Entry {
    Key<T> key;
    uint32_t late;

    __device__ __forceinline__ bool before(const Entry& other) const {
        return key > other.key || (key == other.key && late > other.late);
    }
};

template <typename T>
__device__ __forceinline__ Entry<T> across_lanes(Entry<T> entry, int distance) {
    return {across_lanes(entry.key, distance), across_lanes(entry.late, distance)};
}

// How rivals are ordered: the strongest first, NaN before all; or the nearest to one logit, NaN after all.
template <typename T>
struct Order {
    bool by_distance;
    T from;
    int classes;

    __device__ __forceinline__ Entry<T> entry(T x, int index) const {
        const Key<T> key = by_distance ? ~ascending_key(magnitude(x - from)) : ascending_key(x);
        return {key, static_cast<uint32_t>(classes - 1 - index)};
    }
    __device__ __forceinline__ int index(const Entry<T>& entry) const {
        return classes - 1 - static_cast<int>(entry.late);
    }
};

// Shared memory of the selection.
struct RivalMemory {
    static constexpr int kDigits = 256;
    static constexpr int kBytes = 3 * kDigits * 4 + 16;

    int* counts;    // two times kDigits, which take turns
    int* totals;    // kDigits, sums over the blocks of a cluster
    int* selected;  // how many entries have been listed; that of the first block counts

    __device__ __forceinline__ explicit RivalMemory(unsigned char* shared)
        : counts(reinterpret_cast<int*>(shared)), totals(counts + 2 * kDigits), selected(totals + kDigits) {}
};

struct Digit {
    unsigned value;
    int before;  // how many have a larger digit
    int count;   // how many have this one
};

// The digit of the last of the first `wanted`, counted from the largest digit. For whole warps; wanted is at
// least 1 and at most the number counted.
__device__ __forceinline__ Digit digit_of(const int* counts, int wanted) {
    constexpr int kEach = RivalMemory::kDigits / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int* own = counts + (kWarp - 1 - lane) * kEach;
    int inclusive = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) inclusive += own[j];
    const int sum = inclusive;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int left = __shfl_sync(kAllLanes, inclusive, (lane - distance) & (kWarp - 1));
        if (lane >= distance) inclusive += left;
    }
    const int before = inclusive - sum;
    const int holder = __ffs(__ballot_sync(kAllLanes, before < wanted && wanted <= inclusive)) - 1;
    Digit digit{0, before, 0};
    bool found = false;
#pragma unroll
    for (int j = kEach - 1; j >= 0; --j) {
        if (found) continue;
        digit.value = static_cast<unsigned>((kWarp - 1 - lane) * kEach + j);
        digit.count = own[j];
        found = digit.before + digit.count >= wanted;
        if (!found) digit.before += digit.count;
    }
    digit.value = __shfl_sync(kAllLanes, digit.value, holder);
    digit.before = __shfl_sync(kAllLanes, digit.before, holder);
    digit.count = __shfl_sync(kAllLanes, digit.count, holder);
    return digit;
}

// Finds the least of the `wanted` largest words, digit by digit from that at `shift`; the digits above are 0.
// scan(add) calls add(word) for each of the calling thread's words. On return `wanted` is how many are still
// to be taken among the words that agree with all digits found. True: those are all there are.
template <typename Word, typename Scan>
__device__ __forceinline__ bool find_least(Team& team, const RivalMemory& memory, int shift, Scan scan,
                                           Word& least, int& wanted) {
    constexpr int kDigits = RivalMemory::kDigits;
    for (; shift >= 0; shift -= 8) {
        int* counts = memory.counts + (team.turn++ & 1) * kDigits;
        for (int i = team.thread; i < kDigits; i += team.threads) counts[i] = 0;
        team.sync();
        scan([&](Word word) {
            if (((word ^ least) >> shift >> 8) == 0) {
                atomicAdd(counts + static_cast<int>((word >> shift) & (kDigits - 1)), 1);
            }
        });
        team.sync_all();
        if (team.blocks > 1) {
            for (int i = team.thread; i < kDigits; i += team.threads) {
                int total = 0;
                for (unsigned block = 0; block < team.blocks; ++block) {
                    total += *cluster_peer(counts + i, block);
                }
                memory.totals[i] = total;
            }
            team.sync();
            counts = memory.totals;
        }
        const Digit digit = digit_of(counts, wanted);
        least |= static_cast<Word>(digit.value) << shift;
        wanted -= digit.before;
        if (digit.count == wanted) return true;
    }
    return false;
}

// The last of the first `wanted` rivals, or an entry just after it. wanted: at least 1.
template <typename T, typename Values>
__device__ __forceinline__ Entry<T> last_of_first(Team& team, const RivalMemory& memory, const Values& slice,
                                                  const Order<T>& order, int chosen, int wanted) {
    Entry<T> last{0, 0};
    const auto keys = [&](auto add) {
        slice.for_rivals(team, chosen, [&](int, T x) { add(order.entry(x, 0).key); });
    };
    if (find_least(team, memory, 8 * static_cast<int>(sizeof(T)) - 8, keys, last.key, wanted)) return last;
    const auto ties = [&](auto add) {
        slice.for_rivals(team, chosen, [&](int i, T x) {
            const Entry<T> entry = order.entry(x, slice.first + i);
            if (entry.key == last.key) add(entry.late);
        });
    };
    const int most_digits = (31 - __clz(order.classes)) / 8;
    find_least(team, memory, 8 * most_digits, ties, last.late, wanted);
    return last;
}

// Writes the rivals up to and with `last` in order to `list`, whose size is a power of two; `count` of them
// are filled, and the rest is undefined. list: memory that the first block of the cluster shares with all.
template <typename T, typename Values>
__device__ __forceinline__ void list_in_order(Team& team, const RivalMemory& memory, const Values& slice,
                                              const Order<T>& order, int chosen, const Entry<T>& last,
                                              int count, int size, Entry<T>* list) {
    int* selected = team.in_first_block(memory.selected);
    slice.for_rivals(team, chosen, [&](int i, T x) {
        const Entry<T> entry = order.entry(x, slice.first + i);
        if (!last.before(entry)) list[atomicAdd(selected, 1)] = entry;
    });
    if (team.rank == 0) {
        for (int i = count + team.thread; i < size; i += team.threads) list[i] = {0, 0};
    }
    team.sync_all();
    if (team.rank == 0) {
        // A bitonic network: the order in which entries arrived leaves no trace.
        for (int run = 2; run <= size; run *= 2) {
            for (int distance = run / 2; distance > 0; distance /= 2) {
                for (int i = team.thread; i < size / 2; i += team.threads) {
                    const int low = 2 * i - (i & (distance - 1)), high = low + distance;
                    const Entry<T> a = list[low], b = list[high];
                    if (b.before(a) == ((low & run) == 0)) {
                        list[low] = b;
                        list[high] = a;
                    }
                }
                team.sync();
            }
        }
    }
    if (team.blocks > 1) cluster_sync();
}

}  // namespace diffcam
