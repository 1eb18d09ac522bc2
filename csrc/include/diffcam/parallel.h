// The thread pool a driver runs on, handed in by whoever calls: PyTorch's own for the ops, plain threads for
// NumPy.
#pragma once

#include <stdint.h>

namespace diffcam {

struct Parallel {
    int threads;
    // Calls body(context, begin, end) on disjoint ranges that together cover [0, count). Returns when all are
    // done.
    void (*run)(const Parallel& self, int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                void* context);
};

// Calls function(begin, end) over [0, count) on the pool.
template <typename Function>
void parallel_for(const Parallel& parallel, int64_t count, Function&& function) {
    if (count <= 0) return;
    if (parallel.threads <= 1 || count == 1) {
        function(int64_t{0}, count);
        return;
    }
    auto body = [](void* context, int64_t begin, int64_t end) {
        (*static_cast<decltype(&function)>(context))(begin, end);
    };
    parallel.run(parallel, count, body, static_cast<void*>(&function));
}

}  // namespace diffcam
