// Logit differences on a GPU: one launch, whatever the number of classes.
//
// A team shares a row: a warp where it is short, a block, or a cluster of blocks where a block's shared
// memory would hold too few rows at a time to keep memory busy. The row is copied to shared memory and walked
// there three times: for its maximum, for the sums that the baseline needs, and for the cotangent. So a row
// of K logits moves K * (bytes of a logit + bytes of a result) between the chip and its memory. A row too
// long even for a cluster stays where it is and is read once a walk, as far as possible from the second-level
// cache. Targets of one image are teams of their own, side by side: the first one's reading leaves the row in
// that cache for the others.
//
// Selecting rivals takes a walk for every eight bits of a key until the rest is decided, and one to list
// them.
#include "diffcam/logit_difference.h"
#include "logit_difference_plan.h"
#include "logit_difference_rivals.h"

namespace diffcam {
namespace {

using namespace logit_difference_planning;

constexpr double kFinerEps = 1e-9;
constexpr double kLog2E = 1.4426950408889634;

__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

struct Larger {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};
struct Earlier {
    template <typename T>
    __device__ __forceinline__ Entry<T> operator()(const Entry<T>& a, const Entry<T>& b) const {
        return a.before(b) ? a : b;
    }
};
struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
    template <typename T>
    __device__ __forceinline__ Pair<T> operator()(const Pair<T>& a, const Pair<T>& b) const {
        return {a.first + b.first, a.second + b.second};
    }
};

template <typename T>
__device__ __forceinline__ T not_a_number() {
    return static_cast<T>(__uint_as_float(0x7fc00000u));
}

// One row, as a block of its team sees it.
template <typename E, bool kShared>
struct Row {
    using T = Accumulator<E>;

    Slice<E, kShared> slice;
    T* cotangent;     // of the slice
    int64_t index;    // among all rows
    const E* logits;  // of all classes
    int chosen;
    T own;  // the logit of the chosen class
};

// Stores results in groups: value(element, logit) of every element of the slice.
template <typename E, bool kShared, typename Value>
__device__ __forceinline__ void store(const Team& team, const Row<E, kShared>& row, Value value) {
    using T = Accumulator<E>;
    constexpr int kGroup = Slice<E, kShared>::kGroup;
    row.slice.for_groups(team, [&](int begin, const T* x, unsigned inside) {
        Pack<T, kGroup> results;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) results.element[j] = value(begin + j, x[j]);
        if (inside == (1u << kGroup) - 1) {
            *reinterpret_cast<Pack<T, kGroup>*>(row.cotangent + begin) = results;
            return;
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            if ((inside >> j & 1) != 0) row.cotangent[begin + j] = results.element[j];
        }
    });
}

// What to write of a class that does not exist.
template <typename E, bool kShared>
__device__ __forceinline__ void store_nothing(const Team& team, const Row<E, kShared>& row,
                                              const Task& task) {
    using T = Accumulator<E>;
    const T nan = not_a_number<T>();
    for (int i = team.thread; i < row.slice.count; i += team.threads) row.cotangent[i] = nan;
    if (team.rank != 0) return;
    if (team.thread == 0) static_cast<T*>(task.result.delta)[row.index] = nan;
    for (int64_t j = team.thread; j < task.compared; j += team.threads) {
        task.result.rivals[row.index * task.compared + j] = -1;
        static_cast<T*>(task.result.differences)[row.index * task.compared + j] = nan;
    }
}

// Every baseline but finer: folds `members` rivals, for which is_member(element, logit) holds, into one
// number. centre: the largest of them.
template <typename E, bool kShared, typename IsMember>
__device__ __forceinline__ void contrast(Team& team, const Row<E, kShared>& row, const Task& task,
                                         Accumulator<E> centre, int members, IsMember is_member) {
    using T = Accumulator<E>;
    const Baseline baseline = task.baseline;
    const bool weighted = baseline == Baseline::logsumexp || baseline == Baseline::expected;
    const T factor = static_cast<T>(kLog2E / task.temperature), rate = static_cast<T>(1 / task.temperature);
    const auto weight_of = [&](T less) { return weighted ? power_of_two(less * factor) : T(1); };

    Pair<T> sums{0, 0};  // of weights, and of weights times logits less the centre
    if (baseline != Baseline::max) {
        row.slice.for_rivals(team, row.chosen, [&](int i, T x) {
            if (!is_member(i, x)) return;
            const T less = x - centre, weight = weight_of(less);
            sums.first += weight;
            // A logit of minus infinity has no weight, and must not turn the sum into NaN.
            sums.second += weight * (weight > 0 ? less : T(0));
        });
        sums = team.reduce(sums, Sum());
    }
    const T inverse = weighted ? 1 / sums.first : 1 / static_cast<T>(members);
    const T mean = sums.second * inverse;

    const int chosen = row.chosen - row.slice.first;
    store(team, row, [&](int i, T x) {
        if (i == chosen) return T(1);
        if (!is_member(i, x)) return T(0);
        const T less = x - centre, weight = weight_of(less);
        const T share = weight * inverse;
        if (baseline != Baseline::expected) return -share;
        return -share * (((weight > 0 ? less : T(0)) - mean) * rate + 1);
    });

    if (team.rank != 0 || team.thread != 0) return;
    double value = 0;  // the baseline less the centre
    if (baseline == Baseline::logsumexp) value = task.temperature * log(static_cast<double>(sums.first));
    if (baseline == Baseline::mean || baseline == Baseline::expected) value = mean;
    static_cast<T*>(task.result.delta)[row.index] =
        static_cast<T>((static_cast<double>(row.own) - static_cast<double>(centre)) - value);
}

template <typename E, bool kShared>
__device__ __forceinline__ void contrast_with_all(Team& team, const Row<E, kShared>& row, const Task& task) {
    using T = Accumulator<E>;
    T largest = static_cast<T>(-INFINITY);
    row.slice.for_rivals(team, row.chosen, [&](int, T x) { largest = Larger()(largest, x); });
    largest = team.reduce(largest, Larger());
    contrast(team, row, task, largest, task.classes - 1, [](int, T) { return true; });
}

// The rivals in order, and what is reported of them.
template <typename E, bool kShared>
__device__ __forceinline__ Entry<Accumulator<E>>* list_rivals(Team& team, const RivalMemory& memory,
                                                              const Row<E, kShared>& row, const Task& task,
                                                              const Order<Accumulator<E>>& order,
                                                              const Entry<Accumulator<E>>& last,
                                                              unsigned char* shared) {
    using Listed = Entry<Accumulator<E>>;
    Listed* list = task.list_in_shared ? team.in_first_block(reinterpret_cast<Listed*>(shared))
                                       : static_cast<Listed*>(task.scratch) + row.index * task.list_size;
    list_in_order(team, memory, row.slice, order, row.chosen, last, task.wanted, task.list_size, list);
    return list;
}

template <typename E, bool kShared>
__device__ __forceinline__ void report(const Row<E, kShared>& row, const Task& task, int j, int rival) {
    using T = Accumulator<E>;
    const int64_t at = row.index * task.compared + j;
    task.result.rivals[at] = rival;
    static_cast<T*>(task.result.differences)[at] = row.own - widen(row.logits[rival * task.class_stride]);
}

template <typename E, bool kShared>
__device__ __forceinline__ void contrast_with_strongest(Team& team, const RivalMemory& memory,
                                                        const Row<E, kShared>& row, const Task& task,
                                                        unsigned char* shared) {
    using T = Accumulator<E>;
    const Order<T> order{false, T(0), task.classes};
    Entry<T> first{0, 0};
    row.slice.for_rivals(team, row.chosen,
                         [&](int i, T x) { first = Earlier()(first, order.entry(x, row.slice.first + i)); });
    first = team.reduce(first, Earlier());
    Entry<T> last = first;
    if (task.wanted == task.classes - 1) {
        last = {0, 0};
    } else if (task.wanted > 1) {
        last = last_of_first(team, memory, row.slice, order, row.chosen, task.wanted);
    }
    if (task.compared > 0) {
        const Entry<T>* list = list_rivals(team, memory, row, task, order, last, shared);
        if (team.rank == 0) {
            for (int j = team.thread; j < task.compared; j += team.threads) {
                report(row, task, j, order.index(list[j]));
            }
        }
    }
    const bool only_first = task.baseline == Baseline::max;
    const Entry<T> last_member = only_first ? first : last;
    contrast(team, row, task, number_of<T>(first.key), only_first ? 1 : task.wanted,
             [&](int i, T x) { return !last_member.before(order.entry(x, row.slice.first + i)); });
}

// FinerCAM's target (Zhang et al. 2025) as pytorch-grad-cam defines it.
template <typename E, bool kShared>
__device__ __forceinline__ void contrast_with_nearest(Team& team, const RivalMemory& memory,
                                                      const Row<E, kShared>& row, const Task& task,
                                                      const Ranks& ranks, unsigned char* shared) {
    using T = Accumulator<E>;
    const Order<T> order{true, row.own, task.classes};
    T centre = static_cast<T>(-INFINITY);
    row.slice.for_all(team, [&](int, T x) { centre = Larger()(centre, x); });
    centre = team.reduce(centre, Larger());
    const auto weight_of = [&](T x) { return power_of_two((x - centre) * static_cast<T>(kLog2E)); };
    T sum_weights = 0;
    row.slice.for_all(team, [&](int, T x) { sum_weights += weight_of(x); });
    const double normalizer = 1 / static_cast<double>(team.reduce(sum_weights, Sum()));

    Entry<T> last{0, 0};
    if (task.wanted < task.classes - 1) {
        last = last_of_first(team, memory, row.slice, order, row.chosen, task.wanted);
    }
    const Entry<T>* list = list_rivals(team, memory, row, task, order, last, shared);

    // Every warp for itself: cheaper than telling the others.
    const auto rival_at = [&](int j) { return order.index(list[ranks.rank[j] - 1]); };
    const auto contrast_of = [&](T x) {
        return static_cast<double>(row.own) - task.alpha * static_cast<double>(x);
    };
    double total = 0, weighted = 0;
    for (int j = static_cast<int>(threadIdx.x) % kWarp; j < task.compared; j += kWarp) {
        const T x = widen(row.logits[rival_at(j) * task.class_stride]);
        const double weight = static_cast<double>(weight_of(x)) * normalizer;
        total += weight;
        weighted += weight * contrast_of(x);
    }
    total = reduce_lanes(total, kWarp, Sum());
    weighted = reduce_lanes(weighted, kWarp, Sum());
    const double scale = 1 / (total + kFinerEps), delta = weighted * scale;

    const T share = static_cast<T>(-kFinerEps * delta * scale * normalizer);
    const T of_chosen = static_cast<T>(scale * total);
    const int chosen = row.chosen - row.slice.first;
    store(team, row, [&](int i, T x) {
        const T everywhere = weight_of(x) * share;
        return i == chosen ? everywhere + of_chosen : everywhere;
    });
    team.sync();
    for (int j = team.thread; j < task.compared; j += team.threads) {
        const int rival = rival_at(j), at = rival - row.slice.first;
        if (team.rank == 0) report(row, task, j, rival);
        if (at < 0 || at >= row.slice.count) continue;
        const T x = widen(row.logits[rival * task.class_stride]);
        const T weight = static_cast<T>(static_cast<double>(weight_of(x)) * normalizer);
        row.cotangent[at] =
            weight_of(x) * share + static_cast<T>(scale * weight * (contrast_of(x) - task.alpha - delta));
    }
    if (team.rank == 0 && team.thread == 0) {
        static_cast<T*>(task.result.delta)[row.index] = static_cast<T>(delta);
    }
}

// Calls body(team, row, shared memory after the slots) with the calling thread's team and its row, staged.
template <typename E, bool kShared, bool kSelects, typename Body>
__device__ __forceinline__ void with_row(const Task& task, Body body) {
    using T = Accumulator<E>;
    constexpr int kGroup = Slice<E, kShared>::kGroup;
    const int threads = task.team_threads, of_block = static_cast<int>(threadIdx.x) / threads;
    const unsigned blocks = static_cast<unsigned>(task.blocks);
    unsigned char* shared = dynamic_shared() + of_block * task.team_bytes;
    unsigned char* after_slots = shared + aligned(Team::kSlotsBytes);
    Team team{
        static_cast<int>(threadIdx.x) % threads, threads, blocks > 1 ? cluster_rank() : 0, blocks, shared, 0};

    Row<E, kShared> row;
    row.index =
        task.first_row + static_cast<int64_t>(blockIdx.x / blocks) * (blockDim.x / threads) + of_block;
    if (row.index >= task.rows) return;
    row.logits = static_cast<const E*>(task.logits) + row.index / task.targets * task.image_stride;
    Slice<E, false> slice;
    slice.first = min(static_cast<int>(team.rank) * task.slice_length, task.classes);
    slice.count = min(task.slice_length, task.classes - slice.first);
    slice.data = row.logits + slice.first * task.class_stride;
    slice.stride = task.class_stride;
    row.cotangent = static_cast<T*>(task.result.cotangent) + row.index * task.classes + slice.first;
    slice.shift = static_cast<int>(reinterpret_cast<uintptr_t>(row.cotangent) / sizeof(T) % kGroup);
    slice.wide = slice.stride == 1 &&
                 reinterpret_cast<uintptr_t>(slice.data - slice.shift) % (kGroup * sizeof(E)) == 0;

    const int64_t chosen = task.chosen[row.index];
    const bool exists = chosen >= 0 && chosen < task.classes;
    row.chosen = exists ? static_cast<int>(chosen) : 0;
    row.own = widen(row.logits[row.chosen * task.class_stride]);
    if (kSelects && team.thread == 0) *RivalMemory(after_slots).selected = 0;
    if constexpr (kShared) {
        row.slice = stage(team, slice, shared + task.slice_offset);
    } else {
        row.slice = slice;
    }
    team.sync();
    if (exists) {
        body(team, row, after_slots);
    } else {
        store_nothing(team, row, task);
    }
    // No block may end while another reads its shared memory.
    if (blocks > 1) cluster_sync();
}

template <typename E, bool kShared>
__global__ void __launch_bounds__(kMostThreads, kShared && sizeof(E) < 8 ? 3 : 2)
    logit_difference_all(Task task) {
    with_row<E, kShared, false>(
        task, [&](auto& team, const auto& row, unsigned char*) { contrast_with_all(team, row, task); });
}

template <typename E, bool kShared>
__global__ void __launch_bounds__(kMostThreads, sizeof(E) < 8 ? 2 : 1) logit_difference_strongest(Task task) {
    with_row<E, kShared, true>(task, [&](auto& team, const auto& row, unsigned char* shared) {
        contrast_with_strongest(team, RivalMemory(shared), row, task, shared + aligned(RivalMemory::kBytes));
    });
}

template <typename E, bool kShared>
__global__ void __launch_bounds__(kMostThreads, 1)
    logit_difference_nearest(Task task, const __grid_constant__ Ranks ranks) {
    with_row<E, kShared, true>(task, [&](auto& team, const auto& row, unsigned char* shared) {
        contrast_with_nearest(team, RivalMemory(shared), row, task, ranks,
                              shared + aligned(RivalMemory::kBytes));
    });
}

}  // namespace

int64_t logit_difference_cuda_scratch_bytes(const LogitDifferenceShape& shape,
                                            const LogitDifferenceOptions& options, const CudaQueue& queue) {
    if (!valid(shape, options)) return 0;
    Task task{};
    plan_selection(shape, options, queue, task);
    if (task.list_in_shared) return 0;
    return shape.images * shape.targets * list_bytes(shape.type, task.list_size);
}

int logit_difference_cuda(const LogitDifferenceShape& shape, const void* logits, int64_t image_stride,
                          int64_t class_stride, const int64_t* chosen, const LogitDifferenceOptions& options,
                          const LogitDifferenceResult& result, void* scratch, const CudaQueue& queue) {
    if (!valid(shape, options)) return cudaErrorInvalidValue;
    if (shape.images == 0 || shape.targets == 0) return cudaSuccess;
    Task task{};
    task.logits = logits;
    task.image_stride = image_stride;
    task.class_stride = class_stride;
    task.chosen = chosen;
    task.result = result;
    task.scratch = scratch;
    task.rows = shape.images * shape.targets;
    task.targets = shape.targets;
    task.classes = static_cast<int>(shape.classes);
    task.baseline = options.baseline;
    task.temperature = options.temperature;
    task.alpha = options.alpha;
    plan_selection(shape, options, queue, task);
    const int teams = plan_teams(shape.type, queue, task);
    Ranks ranks{};
    for (int64_t j = 0; j < options.rank_count; ++j) ranks.rank[j] = static_cast<int>(options.ranks[j]);

    const dim3 block(static_cast<unsigned>(teams * task.team_threads));
    const int64_t shared_bytes = teams * int64_t{task.team_bytes},
                  most_rows = kMostGrid / task.blocks * teams;
    int error = cudaSuccess;
    for (; task.first_row < task.rows && error == cudaSuccess; task.first_row += most_rows) {
        const int64_t rows = std::min(task.rows - task.first_row, most_rows);
        const dim3 grid(static_cast<unsigned>(ceil_div(rows, teams) * task.blocks));
        error = with_element_type(shape.type, [&](auto element) {
            using E = decltype(element);
            const auto run = [&](auto in_shared, auto in_place, auto... more) {
                return launch(task.resident ? in_shared : in_place, grid, block, shared_bytes, task.blocks,
                              queue.stream, task, more...);
            };
            if (options.baseline == Baseline::finer) {
                return run(logit_difference_nearest<E, true>, logit_difference_nearest<E, false>, ranks);
            }
            if (task.wanted > 0) {
                return run(logit_difference_strongest<E, true>, logit_difference_strongest<E, false>);
            }
            return run(logit_difference_all<E, true>, logit_difference_all<E, false>);
        });
    }
    return error;
}

}  // namespace diffcam
