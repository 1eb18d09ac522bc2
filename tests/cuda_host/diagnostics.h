// What a simulated device says of launches that it refuses and of threads that wait for ever.
#pragma once

#include <stdio.h>

#include <string>
#include <vector>

#include "machine_state.h"

namespace diffcam::shim {

// Why a launch is refused, or null: CUDA's own limits, and one of ours, whole warps.
inline const char* refusal(const Launch& launch, int capability, int64_t shared_limit) {
    const int64_t threads = int64_t{launch.block.x} * launch.block.y * launch.block.z;
    const int64_t blocks = int64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    if (threads < 1 || threads > 1024) return "a block has 1 to 1024 threads";
    if (threads % kLanes != 0) return "a block has whole warps";
    if (launch.block.z > 64) return "a block has at most 64 threads along z";
    if (blocks < 1) return "a grid has at least one block";
    if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535) {
        return "a grid has at most 2^31 - 1 blocks along x, 65535 along y and z";
    }
    if (launch.shared_bytes < 0 || launch.shared_bytes > shared_limit) {
        return "a block has no more shared memory than the device gives";
    }
    if (launch.cluster < 1 || launch.cluster > 16 || launch.grid.x % launch.cluster != 0) {
        return "a cluster has 1 to 16 blocks, a divisor of those along x";
    }
    return launch.cluster > 1 && capability < 90 ? "clusters need capability 90" : nullptr;
}

// Where the threads of the first block wait that has not ended.
inline std::string deadlock_text(const std::vector<Cluster>& clusters) {
    static const char* const names[] = {"can run", "wait in __syncthreads", "wait in cluster_sync",
                                        "wait in a warp call", "have ended"};
    for (const Cluster& cluster : clusters) {
        for (const Block& block : cluster.blocks) {
            if (block.live == 0) continue;
            unsigned counts[5] = {};
            std::string mask;
            for (unsigned i = 0; i < cluster.threads.size() / cluster.blocks.size(); ++i) {
                const Thread& thread = block.threads[i];
                ++counts[static_cast<int>(thread.state)];
                if (thread.state == State::warp_call && mask.empty()) {
                    char text[80];
                    snprintf(text, sizeof text, " (thread %u with mask %08x)", i, thread.mask);
                    mask = text;
                }
            }
            std::string text;
            for (int state = 0; state < 5; ++state) {
                if (counts[state] == 0) continue;
                text += (text.empty() ? "" : ", ") + std::to_string(counts[state]) + " " + names[state];
                if (state == static_cast<int>(State::warp_call)) text += mask;
            }
            char at[80];
            snprintf(at, sizeof at, "deadlock: of the threads of block (%u, %u, %u), ", block.index.x,
                     block.index.y, block.index.z);
            return at + text;
        }
    }
    return "deadlock";
}

}  // namespace diffcam::shim
