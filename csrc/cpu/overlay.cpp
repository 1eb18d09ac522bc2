// Driver of overlay on the CPU: chooses the kernels, gives each thread its memory and its maps, or parts of
// them.
#include "cpu/overlay.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/cam_source.h"
#include "diffcam/cpu_capability.h"

namespace diffcam {
namespace {

constexpr int64_t kPixelsPerThread = 16 << 10;  // waking a thread for less does not pay
constexpr int64_t kRowsPerPart = 8;
constexpr int64_t kKeptPixels = 80 << 10;  // mixtures of so many stay in the second-level cache

const OverlayKernels& kernels() {
    switch (cpu_capability()) {
#ifdef DIFFCAM_HAS_AVX512
        case CpuCapability::avx512:
            return avx512::overlay_kernels;
#endif
#ifdef DIFFCAM_HAS_AVX2
        case CpuCapability::avx2:
            return avx2::overlay_kernels;
#endif
        default:
            return standard::overlay_kernels;
    }
}

void pack_colors(const float* table, uint32_t* colors) {
    constexpr float kQuarters = 4 * 255;
    for (int i = 0; i < kOverlayColors; ++i) {
        colors[i] = 0;
        for (int channel = 0; channel < 3; ++channel) {
            const float quarters = table[3 * i + channel] * kQuarters + 0.5f;
            // Also for NaN: zero.
            const uint32_t bits =
                quarters > 0 ? static_cast<uint32_t>(std::min(quarters, kQuarters + 0.5f)) : 0;
            colors[i] |= bits << 10 * channel;
        }
    }
}

class Overlay {
  public:
    Overlay(OverlayCall& call, const Parallel& parallel)
        : call_(call), parallel_(parallel), maps_(call.shape.images * call.shape.targets) {
        const int64_t map_pixels = call.shape.height * call.shape.width, pixels = maps_ * map_pixels;
        workers_ = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, pixels / kPixelsPerThread));
        whole_maps_ = maps_ % workers_ == 0 || maps_ >= 4 * workers_;
        call.keeps = needs_brightest() && whole_maps_ && map_pixels <= kKeptPixels;
        bytes_ = kernels_.scratch_bytes(call);
        // Before any thread starts, so that running out of memory is an exception where it can be caught.
        memory_.reset(new unsigned char[bytes_ * workers_ + kOverlayAlignment]);
        first_ = memory_.get() + kOverlayAlignment -
                 reinterpret_cast<uintptr_t>(memory_.get()) % static_cast<uintptr_t>(kOverlayAlignment);
        for (int64_t worker = 0; worker < workers_; ++worker) kernels_.prepare(call_, scratch(worker));
    }

    void run() {
        if (whole_maps_) {
            return run_tasks(parallel_, workers_, maps_, [&](int64_t worker, int64_t map) {
                const OverlayRows rows{map, 0, call_.shape.height};
                OverlayRange range{};
                float brightest = 0;
                if (needs_range()) range = kernels_.range(call_, rows, scratch(worker));
                if (needs_brightest()) brightest = kernels_.brightest(call_, rows, range, scratch(worker));
                kernels_.draw(call_, rows, range, brightest, scratch(worker));
            });
        }
        run_parts();
    }

  private:
    void* scratch(int64_t worker) { return first_ + worker * bytes_; }
    bool needs_range() const { return call_.options.normalize != Normalization::none; }
    bool needs_brightest() const { return call_.options.blend == Blend::uniform; }

    // Too few maps for the threads: each step is taken for all parts before the next. Largest and smallest
    // values are the same whatever the parts.
    void run_parts() {
        const int64_t parts =
            std::max<int64_t>(1, std::min(ceil_div(4 * workers_, maps_), call_.shape.height / kRowsPerPart));
        const auto for_parts = [&](auto&& body) {
            run_tasks(parallel_, workers_, maps_ * parts, [&](int64_t worker, int64_t task) {
                const int64_t part = task % parts;
                body(task,
                     OverlayRows{task / parts, call_.shape.height * part / parts,
                                 call_.shape.height * (part + 1) / parts},
                     scratch(worker));
            });
        };
        std::vector<OverlayRange> ranges(static_cast<size_t>(maps_ * parts), OverlayRange{});
        std::vector<float> brightest(static_cast<size_t>(maps_ * parts), 0.0f);
        if (needs_range()) {
            for_parts([&](int64_t task, const OverlayRows& rows, void* memory) {
                ranges[task] = kernels_.range(call_, rows, memory);
            });
            for (int64_t map = 0; map < maps_; ++map) {
                OverlayRange whole = ranges[map * parts];
                for (int64_t task = map * parts; task < (map + 1) * parts; ++task) {
                    whole.low = std::min(whole.low, ranges[task].low);
                    whole.high = std::max(whole.high, ranges[task].high);
                    whole.nan = whole.nan || ranges[task].nan;
                }
                std::fill_n(ranges.begin() + map * parts, parts, whole);
            }
        }
        if (needs_brightest()) {
            for_parts([&](int64_t task, const OverlayRows& rows, void* memory) {
                brightest[task] = kernels_.brightest(call_, rows, ranges[task], memory);
            });
            for (int64_t map = 0; map < maps_; ++map) {
                const auto first = brightest.begin() + map * parts;
                std::fill_n(first, parts, *std::max_element(first, first + parts));
            }
        }
        for_parts([&](int64_t task, const OverlayRows& rows, void* memory) {
            kernels_.draw(call_, rows, ranges[task], brightest[task], memory);
        });
    }

    const OverlayCall& call_;
    const Parallel& parallel_;
    const OverlayKernels& kernels_ = kernels();
    int64_t maps_;
    int64_t workers_;
    bool whole_maps_;  // a task is a map
    int64_t bytes_;
    std::unique_ptr<unsigned char[]> memory_;
    unsigned char* first_;
};

}  // namespace

void overlay_cpu(const OverlayShape& shape, const ConstView& maps, const ConstView& images,
                 const float* table, const OverlayOptions& options, uint8_t* pictures,
                 const Parallel& parallel) {
    if (shape.images * shape.targets * shape.height * shape.width == 0) return;
    OverlayCall call{shape, maps, images, options, pictures, {}, false};
    pack_colors(table, call.colors);
    Overlay(call, parallel).run();
}

}  // namespace diffcam
