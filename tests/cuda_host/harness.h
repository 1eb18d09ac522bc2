// What the harness of every op shares: one call on a simulated device, with memory that shows mistakes.
#pragma once

#include "cuda_host_shim.h"
#include "diffcam/cuda.h"

#define DIFFCAM_TEST_API extern "C" __attribute__((visibility("default")))

struct SimulatedDevice {
    int multiprocessors;
    int capability;
    int64_t shared_bytes;
    uint64_t seed;
};

namespace diffcam::shim {

// Calls launcher(queue, scratch) and then runs what it queued. Scratch memory starts as NaN and ends in a
// guard.
template <typename Launcher>
int run_on(const SimulatedDevice& device, int64_t scratch_bytes, Launcher launcher) {
    constexpr size_t kAlignment = 256;
    constexpr unsigned char kGuard = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
    constexpr size_t kGuardBytes = 0;
#else
    constexpr size_t kGuardBytes = 256;
#endif
    if (scratch_bytes < 0) return machine().refuse("a launcher asks for a negative number of bytes");
    const size_t bytes = static_cast<size_t>(scratch_bytes);
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, max<size_t>(bytes + kGuardBytes, 1)) != 0) abort();
    unsigned char* scratch = static_cast<unsigned char*>(memory);
    memset(scratch, kPoison, bytes);
    memset(scratch + bytes, kGuard, kGuardBytes);

    machine().seed(device.seed);
    machine().set_device(device.capability, device.shared_bytes);
    const CudaQueue queue{nullptr, device.multiprocessors, device.capability, device.shared_bytes};
    int error = launcher(queue, scratch);
    if (error == cudaSuccess) error = machine().synchronize();
    for (size_t i = 0; i < kGuardBytes && error == cudaSuccess; ++i) {
        if (scratch[bytes + i] != kGuard)
            error = machine().refuse("scratch memory was written beyond its end");
    }
    free(memory);
    return error;
}

}  // namespace diffcam::shim

DIFFCAM_TEST_API const char* shim_error_text() { return diffcam::shim::machine().error_text(); }
DIFFCAM_TEST_API int shim_launches() { return diffcam::shim::machine().finished_launches(); }
DIFFCAM_TEST_API void shim_leave_out(const char* file, int line) {
    diffcam::shim::machine().leave_out(file, line);
}
DIFFCAM_TEST_API const char* shim_sites() {
    static std::string sites;
    sites = diffcam::shim::machine().sites();
    return sites.c_str();
}
