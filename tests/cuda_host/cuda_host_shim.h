// Stands in for csrc/cuda/runtime.h in tests: the CUDA kernels compile as host code and run on a simulated
// device (machine.h), every thread a fibre. Says nothing of speed or of memory ordering.
//
// To help mistakes show: shared memory starts as NaN, the bytes of an asynchronous copy are NaN until the
// wait that it needs, launches only begin at synchronize(), when the launcher has returned, and blocks, warps
// and lanes run in an order drawn from a seed (machine().seed).
#pragma once

#include <type_traits>

#include "machine.h"

// ---- barriers and warps ---------------------------------------------------------------------------------

// The last two arguments say where in the kernel's source the call stands, so that a test can leave it out.
#define DIFFCAM_SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(DIFFCAM_SHIM_SITE) {
    if (diffcam::shim::machine().leaves_out(file, line)) return;
    diffcam::shim::machine().block_barrier();
}

inline void __syncwarp(unsigned mask = ~0u, DIFFCAM_SHIM_SITE) {
    if (diffcam::shim::machine().leaves_out(file, line)) return;
    diffcam::shim::machine().warp_call(diffcam::shim::WarpCall::sync, mask, 0, 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(
        diffcam::shim::machine().warp_call(diffcam::shim::WarpCall::ballot, mask, predicate != 0, 0));
}

inline int __any_sync(unsigned mask, int predicate) {
    return static_cast<int>(
        diffcam::shim::machine().warp_call(diffcam::shim::WarpCall::any, mask, predicate != 0, 0));
}

inline int __all_sync(unsigned mask, int predicate) {
    return static_cast<int>(
        diffcam::shim::machine().warp_call(diffcam::shim::WarpCall::all, mask, predicate != 0, 0));
}

namespace diffcam::shim {

template <typename T>
T shuffle(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "what a shuffle carries");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = machine().warp_call(WarpCall::shuffle, mask, bits, source_lane);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline int lane() { return static_cast<int>(machine().thread().lane); }

// Lanes are grouped by `width`, a power of two; a source outside the group is the lane itself.
inline int within(int source, int width) { return source / width == lane() / width ? source : lane(); }

}  // namespace diffcam::shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = diffcam::shim::kLanes) {
    const int group = diffcam::shim::lane() / width * width;
    return diffcam::shim::shuffle(mask, value, group + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = diffcam::shim::kLanes) {
    return diffcam::shim::shuffle(mask, value, diffcam::shim::within(diffcam::shim::lane() ^ lanes, width));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = diffcam::shim::kLanes) {
    const int source = diffcam::shim::lane() + static_cast<int>(lanes);
    return diffcam::shim::shuffle(mask, value, diffcam::shim::within(source, width));
}

// ---- memory ---------------------------------------------------------------------------------------------

inline void __threadfence() {}  // memory is sequentially consistent here

template <typename T>
T __ldg(const T* address) {
    return *address;
}

template <typename T>
T __ldcs(const T* address) {
    return *address;
}

namespace diffcam::shim {

// Atomics on floating-point numbers do not compile: their sums would depend on the order.
template <typename T, typename Function>
T atomic(T* address, Function function) {
    static_assert(std::is_integral_v<T>, "integers only");
    machine().preempt();
    const T old = *address;
    *address = function(old);
    return old;
}

template <typename T>
struct Same {
    using type = T;
};

}  // namespace diffcam::shim

template <typename T>
T atomicAdd(T* address, typename diffcam::shim::Same<T>::type value) {
    return diffcam::shim::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}

template <typename T>
T atomicMax(T* address, typename diffcam::shim::Same<T>::type value) {
    return diffcam::shim::atomic(address, [=](T old) { return max(old, value); });
}

template <typename T>
T atomicMin(T* address, typename diffcam::shim::Same<T>::type value) {
    return diffcam::shim::atomic(address, [=](T old) { return min(old, value); });
}

// ---- what runtime.h offers, described there -------------------------------------------------------------

namespace diffcam {

inline unsigned char* dynamic_shared() { return shim::machine().block().shared; }

inline void copy_async_16(void* shared, const void* global) {
    shim::Machine& machine = shim::machine();
    const int64_t offset = static_cast<unsigned char*>(shared) - machine.block().shared;
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        machine.fail("copy_async_16 of addresses that are no multiples of 16");
    }
    if (offset < 0 || offset + 16 > machine.shared_bytes()) {
        machine.fail("copy_async_16 to offset %lld of %lld bytes of shared memory",
                     static_cast<long long>(offset), static_cast<long long>(machine.shared_bytes()));
    }
    memset(shared, shim::kPoison, 16);
    machine.thread().copies.push_back({shared, global, machine.thread().open_group});
}

inline void copy_async_commit() { ++shim::machine().thread().open_group; }

template <int pending>
void copy_async_wait(DIFFCAM_SHIM_SITE) {
    static_assert(pending >= 0, "a number of groups");
    if (shim::machine().leaves_out(file, line)) return;
    shim::Thread& thread = shim::machine().thread();
    const auto is_due = [&](const shim::Copy& copy) { return copy.group < thread.open_group - pending; };
    for (const shim::Copy& copy : thread.copies) {
        if (is_due(copy)) memcpy(copy.shared, copy.global, 16);
    }
    thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), is_due),
                        thread.copies.end());
}

inline unsigned cluster_rank() { return shim::machine().block().rank; }

inline void cluster_sync(DIFFCAM_SHIM_SITE) {
    if (shim::machine().leaves_out(file, line)) return;
    shim::machine().cluster_barrier();
}

template <typename T>
T* cluster_peer(T* shared, unsigned rank) {
    shim::Machine& machine = shim::machine();
    const shim::Block& block = machine.block();
    const int64_t offset = reinterpret_cast<const unsigned char*>(shared) - block.shared;
    if (offset < 0 || offset > machine.shared_bytes()) {
        machine.fail("cluster_peer of an address outside shared memory");
    }
    if (rank >= block.cluster->blocks.size()) {
        machine.fail("cluster_peer %u in a cluster of %zu", rank, block.cluster->blocks.size());
    }
    return reinterpret_cast<T*>(block.cluster->blocks[rank].shared + offset);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, int cluster,
           void* /*stream*/, Arguments... arguments) {
    return shim::machine().enqueue({grid, block, shared_bytes, static_cast<unsigned>(cluster),
                                    [=] { kernel(static_cast<Parameters>(arguments)...); }});
}

}  // namespace diffcam

#undef DIFFCAM_SHIM_SITE
