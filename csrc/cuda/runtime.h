// All that the kernels use of CUDA beyond the language itself. Tests put another file in its place, which
// runs the same kernels as host code (tests/cuda_host/), so a kernel takes these from here and nowhere else.
#pragma once

#if !defined(__CUDACC__)
#include "cuda_host_shim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace diffcam {

// Shared memory of the calling block, as much as its launch asked for, aligned to 16 bytes. Kernels declare
// no other.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char diffcam_shared[];
    return diffcam_shared;
}

// Starts a copy of 16 bytes from global to shared memory; both addresses are multiples of 16. Copies started
// before a commit form a group; a wait returns when no more than `pending` of the calling thread's groups are
// under way. Other threads see what was copied after a barrier that follows the wait.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Blocks of one cluster (capability 90 and up) can wait for each other and read each other's shared memory.
// Below, and where a launch asks for clusters of one, a block is a cluster of its own.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

// A barrier of all threads of the cluster, which also makes writes to shared memory seen across its blocks.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#else
    __syncthreads();
#endif
}

// Where an object in the calling block's shared memory lies in that of the block with the given rank.
template <typename T>
__device__ __forceinline__ T* cluster_peer(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t address;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    (void)rank;
    return shared;
#endif
}

// Queues a kernel and returns CUDA's error code. A cluster is a number of neighbouring blocks along x, a
// divisor of grid.x, 1 below capability 90, at most 16.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, int cluster,
           void* stream, Arguments... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    constexpr int64_t kSharedWithoutAsking = 48 << 10;
    if (shared_bytes > kSharedWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    constexpr int kPortableCluster = 8;
    if (cluster > kPortableCluster) {
        const cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace diffcam

#endif
