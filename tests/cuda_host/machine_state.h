// What a simulated device keeps of its threads, warps, blocks and clusters.
#pragma once

#include <functional>
#include <vector>

#include "cuda_host_types.h"
#include "fibre.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace diffcam::shim {

constexpr int kLanes = 32;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in every integer

enum class State : uint8_t { ready, block_barrier, cluster_barrier, warp_call, exited };
enum class WarpCall : uint8_t { sync, ballot, any, all, shuffle };

struct Block;
struct Cluster;

struct Copy {
    void* shared;
    const void* global;
    int64_t group;
};

struct Thread {
    Fibre* fibre;
    uint3 index;
    unsigned lane;
    struct Warp* warp;
    State state;
    WarpCall call;  // what follows belongs to the warp call the thread waits in
    unsigned mask;
    int source_lane;
    uint64_t value, result;
    std::vector<Copy> copies;  // started and not yet waited for
    int64_t open_group;
};

struct Warp {
    Block* block;
    Thread* lanes;
    uint32_t ready, waiting;  // lanes that may run, and that wait in a warp call
};

struct Block {
    Cluster* cluster;
    uint3 index;
    unsigned rank;
    unsigned char* shared;
    bool started;
    unsigned live, at_barrier;
    Thread* threads;
};

struct Cluster {
    unsigned live, at_barrier;
    std::vector<Block> blocks;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
};

struct Launch {
    dim3 grid, block;
    int64_t shared_bytes;
    unsigned cluster;
    std::function<void()> body;
};

inline unsigned threads_of(dim3 block) { return block.x * block.y * block.z; }

// Repeatable numbers; quality matters little, speed does.
class Random {
  public:
    void seed(uint64_t seed) { state_ = (seed + 1) * 0x9e3779b97f4a7c15u; }
    uint32_t bits() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
    }
    uint32_t below(uint64_t count) { return static_cast<uint32_t>(bits() * count >> 32); }
    bool one_in(uint32_t count) { return below(count) == 0; }

  private:
    uint64_t state_ = 1;
};

}  // namespace diffcam::shim
