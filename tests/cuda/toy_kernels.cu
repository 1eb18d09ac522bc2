// Small kernels that try each part of the shim, and misuse it on purpose.
#include "harness.h"
#include "runtime.h"

namespace diffcam {
namespace {

constexpr unsigned kFull = 0xffffffffu;

// Threads read what others wrote before a barrier, and write again only after the next one.
__global__ void rotate(const float* input, float* output, int rounds) {
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    const unsigned thread = threadIdx.x;
    const unsigned place = blockIdx.x * blockDim.x + thread;
    float value = input[place];
    for (int round = 0; round < rounds; ++round) {
        shared[thread] = value;
        __syncthreads();  // written
        value = shared[(thread + 33) % blockDim.x];
        __syncthreads();  // read
    }
    output[place] = value;
}

// The same within warps.
__global__ void rotate_in_warp(const float* input, float* output, int rounds) {
    const unsigned lane = threadIdx.x % 32;
    float* shared = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x - lane;
    const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
    float value = input[place];
    for (int round = 0; round < rounds; ++round) {
        shared[lane] = value;
        __syncwarp();  // written
        value = shared[(lane + 1) % 32];
        __syncwarp();  // read
    }
    output[place] = value;
}

// Ten results a thread, one for each call.
__global__ void warp_calls(const int* input, int* output) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int value = input[threadIdx.x];
    int* results = output + threadIdx.x * 10;
    results[0] = __shfl_xor_sync(kFull, value, 5);
    results[1] = __shfl_down_sync(kFull, value, 3);
    results[2] = __shfl_sync(kFull, value, 7);
    results[3] = __shfl_xor_sync(kFull, value, 3, 8);
    results[4] = __shfl_sync(kFull, value, 1, 16);
    results[5] = static_cast<int>(__ballot_sync(kFull, value & 1));
    results[6] = __any_sync(kFull, value > 100);
    results[7] = __all_sync(kFull, value > 0);
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    results[8] = 0;
    if (lane < 16) {
        results[8] = __shfl_xor_sync(half, value, 1);
    } else {
        results[8] = static_cast<int>(__ballot_sync(half, value & 1));
    }
    results[9] = static_cast<int>(__double_as_longlong(__shfl_down_sync(kFull, 1.0 * value, 1)) >> 32);
}

// The sum over a cluster, read by every block from its peers.
__global__ void cluster_sum(const float* input, float* output, int cluster) {
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
    shared[threadIdx.x] = input[place];
    cluster_sync();  // written
    float sum = 0;
    for (int rank = 0; rank < cluster; ++rank) {
        sum += cluster_peer(shared, static_cast<unsigned>(rank))[threadIdx.x] * static_cast<float>(rank + 1);
    }
    output[place] = sum + static_cast<float>(cluster_rank());
    cluster_sync();  // read: a block that has ended has no shared memory
}

// Running sums over rows of four numbers a thread, copied two stages ahead.
__global__ void copied_ahead(const float* input, float* output, int rows) {
    constexpr int kStages = 3;
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    const int width = static_cast<int>(blockDim.x) * 4;
    const auto start = [&](int row) {
        if (row < rows) {
            float* stage = shared + row % kStages * width;
            copy_async_16(stage + 4 * threadIdx.x, input + row * width + 4 * static_cast<int>(threadIdx.x));
        }
        copy_async_commit();
    };
    for (int row = 0; row < kStages - 1; ++row) start(row);
    float sum = 0;
    for (int row = 0; row < rows; ++row) {
        copy_async_wait<kStages - 2>();  // copied
        __syncthreads();                 // seen by all, and the stage to be filled next read by all
        sum += shared[row % kStages * width + (static_cast<int>(threadIdx.x) * 4 + 77) % width];
        start(row + kStages - 1);
    }
    output[threadIdx.x] = sum;
}

// The block that draws the last ticket adds what all have left in memory.
__global__ void last_block_sums(const int* input, int* output, int* partial, unsigned* ticket) {
    unsigned* drawn = reinterpret_cast<unsigned*>(dynamic_shared());
    partial[blockIdx.x * blockDim.x + threadIdx.x] = input[blockIdx.x * blockDim.x + threadIdx.x];
    __threadfence();
    __syncthreads();  // all written
    if (threadIdx.x == 0) *drawn = atomicAdd(ticket, 1u);
    __syncthreads();  // drawn
    if (*drawn != gridDim.x - 1) return;
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * blockDim.x + threadIdx.x];
    output[threadIdx.x] = sum;
}

__global__ void misuse(int kind, float* memory) {
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    const unsigned thread = threadIdx.x;
    switch (kind) {
        case 0:  // one warp waits at a barrier, the other in a shuffle with a lane that waits at the barrier
            if (thread != 5) __syncwarp();
            __syncthreads();
            break;
        case 1:  // a lane that has ended
            if (thread % 32 == 3) return;
            memory[thread] = __shfl_xor_sync(kFull, 1.0f, 1);
            break;
        case 2:  // a mask without the calling lane
            __syncwarp(1u << ((thread + 1) % 32));
            break;
        case 3:  // different calls
            if (thread % 32 < 16) {
                __syncwarp();
            } else {
                memory[thread] = static_cast<float>(__ballot_sync(kFull, 1));
            }
            break;
        case 4:
            copy_async_16(shared + 1, memory);
            break;
        case 5:
            copy_async_16(shared + blockDim.x, memory);
            break;
        case 6:
            *cluster_peer(shared, 1) = 1;
            break;
        case 7:
            shared[blockDim.x + thread % 8] = 1;
            break;  // beyond the end
        case 8:
            memory[thread] = shared[blockDim.x];
            break;
        case 9:
            memory[thread] = reinterpret_cast<float4*>(memory + 1)[thread].x;
            break;  // not aligned
        default:
            if (thread < 32) {
                __syncthreads();
            } else {
                cluster_sync();
            }
    }
}

}  // namespace
}  // namespace diffcam

using namespace diffcam;

DIFFCAM_TEST_API int run_rotate(const float* input, float* output, int blocks, int threads, int rounds,
                                bool in_warp, const SimulatedDevice* device) {
    return shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        return launch(in_warp ? rotate_in_warp : rotate, dim3(static_cast<unsigned>(blocks)),
                      dim3(static_cast<unsigned>(threads)), threads * 4, 1, queue.stream, input, output,
                      rounds);
    });
}

DIFFCAM_TEST_API int run_warp_calls(const int* input, int* output, const SimulatedDevice* device) {
    return shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        return launch(warp_calls, dim3(1), dim3(64), 0, 1, queue.stream, input, output);
    });
}

DIFFCAM_TEST_API int run_cluster_sum(const float* input, float* output, int blocks, int cluster,
                                     const SimulatedDevice* device) {
    return shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        return launch(cluster_sum, dim3(static_cast<unsigned>(blocks), 2), dim3(64), 64 * 4, cluster,
                      queue.stream, input, output, cluster);
    });
}

DIFFCAM_TEST_API int run_copied_ahead(const float* input, float* output, int rows,
                                      const SimulatedDevice* device) {
    return shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        return launch(copied_ahead, dim3(1), dim3(128), 3 * 128 * 16, 1, queue.stream, input, output, rows);
    });
}

DIFFCAM_TEST_API int run_last_block_sums(const int* input, int* output, int blocks,
                                         const SimulatedDevice* device) {
    unsigned ticket = 0;
    return shim::run_on(*device, int64_t{blocks} * 128 * 4, [&](const CudaQueue& queue, void* scratch) {
        return launch(last_block_sums, dim3(static_cast<unsigned>(blocks)), dim3(128), 4, 1, queue.stream,
                      input, output, static_cast<int*>(scratch), &ticket);
    });
}

DIFFCAM_TEST_API int run_misuse(int kind, float* memory, const SimulatedDevice* device) {
    return shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        return launch(misuse, dim3(2), dim3(64), 64 * 4, 1, queue.stream, kind, memory);
    });
}

// Queues a launch of any size; memory is left as it was, because nothing runs.
DIFFCAM_TEST_API int try_launch(int grid_x, int grid_y, int threads, int64_t shared_bytes, int cluster,
                                const SimulatedDevice* device) {
    shim::machine().set_device(device->capability, device->shared_bytes);
    const int error =
        launch(misuse, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)),
               dim3(static_cast<unsigned>(threads)), shared_bytes, cluster, nullptr, 0, nullptr);
    if (error == cudaSuccess) shim::machine().refuse("");
    return error;
}

// Writes one number when it runs; returns what it was when the launcher had returned.
DIFFCAM_TEST_API int value_after_launch(const SimulatedDevice* device) {
    int value = 1, seen = 0;
    const int error = shim::run_on(*device, 0, [&](const CudaQueue& queue, void*) {
        void (*kernel)(int*) = [](int* address) { *address = 2; };
        const int launched = launch(kernel, dim3(1), dim3(32), 0, 1, queue.stream, &value);
        seen = value;
        return launched;
    });
    return error != 0 ? -error : 10 * seen + value;
}

DIFFCAM_TEST_API void convert(const float* input, int64_t count, uint16_t* bfloat16s, uint16_t* halves) {
    for (int64_t i = 0; i < count; ++i) {
        bfloat16s[i] = __bfloat16_as_ushort(__float2bfloat16(input[i]));
        halves[i] = __half_as_ushort(__float2half(input[i]));
    }
}

DIFFCAM_TEST_API void convert_back(float* from_bfloat16, float* from_half) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
        from_bfloat16[bits] = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
        from_half[bits] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    }
}
