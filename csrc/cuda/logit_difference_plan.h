// How logit_difference_cuda shares a call out: which rivals are selected, which threads share a row, and
// where it lies in their shared memory.
#pragma once

#include <algorithm>

#include "diffcam/logit_difference.h"
#include "logit_difference_rivals.h"

namespace diffcam {
namespace logit_difference_planning {

constexpr int kMostClasses = 1 << 30;  // so that indices stay below 2^31
struct Task {
    const void* logits;
    int64_t image_stride;
    int64_t class_stride;
    const int64_t* chosen;
    LogitDifferenceResult result;
    void* scratch;      // lists of rivals, where shared memory has no room for them
    int64_t first_row;  // of this launch
    int64_t rows;
    int64_t targets;
    int classes;
    Baseline baseline;
    double temperature;
    double alpha;
    int compared;   // rivals reported
    int wanted;     // the first so many rivals are selected
    int list_size;  // a power of two that is no less
    bool list_in_shared;
    bool resident;  // slices are copied to shared memory
    int team_threads;
    int team_bytes;    // of shared memory
    int slice_offset;  // of the slice in them
    int blocks;        // of a cluster
    int slice_length;  // of all blocks but the last
};

struct Ranks {
    int rank[kMostCudaRanks];
};

__host__ __device__ constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// A team's shared memory: slots, then what selecting takes, then the slice.
constexpr int64_t fixed_bytes(bool selects) {
    return aligned(Team::kSlotsBytes) + (selects ? aligned(RivalMemory::kBytes) : 0);
}

constexpr int kLogitsPerThread = 8;      // more threads would find too little to do
constexpr int kWarpTeams = 4;            // of a block, where a warp serves a row
constexpr int kRowsAtATime = 3;          // that a multiprocessor's shared memory should hold
constexpr int kLeastSlice = 512;         // logits of a block, below which a cluster does not help
constexpr int kLeastSpreadSlice = 4096;  // the same where there are more multiprocessors than rows
constexpr int kPortableCluster = 8;
constexpr int64_t kMostGrid = 1 << 30;  // CUDA's limit is twice that; what is beyond takes another launch

inline int64_t list_bytes(ScalarType type, int64_t size) {
    return size *
           static_cast<int64_t>(type == ScalarType::float64 ? sizeof(Entry<double>) : sizeof(Entry<float>));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool valid(const LogitDifferenceShape& shape, const LogitDifferenceOptions& options) {
    const bool finer = options.baseline == Baseline::finer;
    if (shape.classes < 2 || shape.classes > kMostClasses) return false;
    if (options.top_k < 0 || options.top_k >= shape.classes || (finer && options.top_k > 0)) return false;
    if (finer != (options.rank_count > 0) || options.rank_count > kMostCudaRanks) return false;
    for (int64_t j = 0; j < options.rank_count; ++j) {
        if (options.ranks[j] < 1 || options.ranks[j] >= shape.classes) return false;
    }
    return true;
}

// The part of a task that says which rivals are selected and where they are listed.
inline void plan_selection(const LogitDifferenceShape& shape, const LogitDifferenceOptions& options,
                           const CudaQueue& queue, Task& task) {
    const bool finer = options.baseline == Baseline::finer;
    task.compared = static_cast<int>(finer ? options.rank_count : options.top_k);
    task.wanted = static_cast<int>(options.baseline == Baseline::max ? std::max<int64_t>(options.top_k, 1)
                                                                     : options.top_k);
    for (int64_t j = 0; finer && j < options.rank_count; ++j) {
        task.wanted = std::max(task.wanted, static_cast<int>(options.ranks[j]));
    }
    task.list_size = task.compared > 0 ? 1 : 0;
    while (task.list_size < task.wanted && task.compared > 0) task.list_size *= 2;
    task.list_in_shared = list_bytes(shape.type, task.list_size) <= queue.shared_bytes / 8;
}

// How the rows are divided: sets the rest of the task, returns the teams of a block.
inline int plan_teams(ScalarType type, const CudaQueue& queue, Task& task) {
    const int64_t element = scalar_bytes(type);
    const int64_t before_slice =
        fixed_bytes(task.wanted > 0) + (task.list_in_shared ? aligned(list_bytes(type, task.list_size)) : 0);
    const auto slice_length = [&](int blocks) {
        // Whole 16-byte accesses: all slices are aligned alike.
        return blocks == 1 ? task.classes : static_cast<int>(ceil_div(task.classes, 16 * blocks) * 16);
    };
    const auto bytes_with = [&](int blocks) {
        return before_slice + aligned(slice_length(blocks) * element + 32);
    };
    const int most = queue.capability < 90                               ? 1
                     : queue.capability == 90 || queue.capability == 100 ? 2 * kPortableCluster
                                                                         : kPortableCluster;
    int blocks = 1;
    while (blocks < most && slice_length(blocks) > kLeastSlice &&
           bytes_with(blocks) > queue.shared_bytes / kRowsAtATime) {
        blocks *= 2;
    }
    while (blocks < std::min(most, kPortableCluster) && slice_length(blocks) > kLeastSpreadSlice &&
           task.rows * blocks < queue.multiprocessors) {
        blocks *= 2;
    }
    task.blocks = blocks;
    task.slice_length = slice_length(blocks);
    task.resident = bytes_with(blocks) <= queue.shared_bytes;
    task.slice_offset = static_cast<int>(before_slice);
    task.team_bytes = static_cast<int>(task.resident ? bytes_with(blocks) : before_slice);
    task.team_threads = kWarp;
    while (task.team_threads < kMostThreads && task.team_threads * kLogitsPerThread < task.slice_length) {
        task.team_threads *= 2;
    }
    if (blocks > 1 || task.team_threads > kWarp) return 1;
    const int64_t room = queue.shared_bytes / kRowsAtATime / task.team_bytes;
    const int64_t rows_each = ceil_div(task.rows, queue.multiprocessors);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kWarpTeams, std::min(room, rows_each))));
}

}  // namespace logit_difference_planning
}  // namespace diffcam
