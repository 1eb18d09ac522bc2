// Which of the compiled instruction-set variants serves this process.
#pragma once

namespace diffcam {

enum class CpuCapability : int { standard = 0, avx2 = 1, avx512 = 2 };

// The best variant this processor runs, or a lower one that DIFFCAM_CPU_CAPABILITY (default, avx2, avx512)
// asks for.
CpuCapability cpu_capability();

// The best variant this processor runs, whatever the environment asks for.
CpuCapability best_cpu_capability();

// Chooses a variant for the rest of the process; one that the processor does not run is refused with false.
bool set_cpu_capability(CpuCapability capability);

const char* cpu_capability_name(CpuCapability capability);

// Parses "default", "avx2" or "avx512"; false for anything else.
bool parse_cpu_capability(const char* name, CpuCapability* capability);

}  // namespace diffcam
