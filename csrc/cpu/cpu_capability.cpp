#include "diffcam/cpu_capability.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace diffcam {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

CpuCapability detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Not every compiler's __builtin_cpu_supports knows F16C, the conversion of half precision.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1u) != 0;
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return CpuCapability::standard;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? CpuCapability::avx512 : CpuCapability::avx2;
#else
    return CpuCapability::standard;
#endif
}

CpuCapability initial() {
    const CpuCapability best = best_cpu_capability();
    CpuCapability wanted = best;
    const char* name = std::getenv("DIFFCAM_CPU_CAPABILITY");
    if (name == nullptr || !parse_cpu_capability(name, &wanted)) return best;
    return wanted < best ? wanted : best;
}

std::atomic<CpuCapability>& current() {
    static std::atomic<CpuCapability> capability{initial()};
    return capability;
}

}  // namespace

CpuCapability best_cpu_capability() {
    static const CpuCapability best = detect();
    return best;
}

CpuCapability cpu_capability() { return current().load(std::memory_order_relaxed); }

bool set_cpu_capability(CpuCapability capability) {
    if (capability < CpuCapability::standard || capability > best_cpu_capability()) return false;
    current().store(capability, std::memory_order_relaxed);
    return true;
}

const char* cpu_capability_name(CpuCapability capability) { return kNames[static_cast<int>(capability)]; }

bool parse_cpu_capability(const char* name, CpuCapability* capability) {
    for (int i = 0; i < 3; ++i) {
        if (std::strcmp(name, kNames[i]) == 0) {
            *capability = static_cast<CpuCapability>(i);
            return true;
        }
    }
    return false;
}

}  // namespace diffcam
