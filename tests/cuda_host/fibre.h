// Stacks that a single thread switches between: each simulated CUDA thread runs on one.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace diffcam::shim {

#if defined(__x86_64__)

// Pushes the registers that a call preserves, leaves the stack pointer in *save and goes on where `load` was
// left. swapcontext does the same with a system call for the signal mask, some fifty times as long.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
        "ret\n");
}

struct Context {
    void* stack_pointer = nullptr;

    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        constexpr int kSavedRegisters = 6;
        // As a call would leave it: the stack pointer is 8 short of a multiple of 16 when `entry` begins.
        void** top = reinterpret_cast<void**>(stack + bytes) - 3;
        top[0] = top[1] = top[2] = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
        stack_pointer = top;
    }

    static void swap(Context* from, Context* to) { switch_stack(&from->stack_pointer, to->stack_pointer); }
};

#else

struct Context {
    ucontext_t context;

    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }

    static void swap(Context* from, Context* to) { swapcontext(&from->context, &to->context); }
};

#endif

// A stack of its own, with a page below it that may not be touched. Kept and reused for the process's life.
class Fibre {
  public:
    Fibre() = default;
    Fibre(const Fibre&) = delete;
    Fibre& operator=(const Fibre&) = delete;

    // The next resume() calls entry, which must not return but leave() at its end.
    void start(void (*entry)()) {
        if (stack_ == nullptr) allocate();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack_, kStackBytes);  // frames that were left, not returned from
#endif
        context_.prepare(stack_, kStackBytes - offset_, entry);
    }

    // Runs the fibre until it suspends or leaves. Called from the scheduler's stack.
    void resume() {
#if defined(__SANITIZE_ADDRESS__)
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
        Context::swap(&scheduler(), &context_);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
        Context::swap(&scheduler(), &context_);
#endif
    }

    // Back to the scheduler; returns with the next resume(). Called on the fibre's own stack.
    void suspend() {
#if defined(__SANITIZE_ADDRESS__)
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack().bottom, scheduler_stack().bytes);
        Context::swap(&context_, &scheduler());
        __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack().bottom, &scheduler_stack().bytes);
#else
        Context::swap(&context_, &scheduler());
#endif
    }

    // What entry calls first and last.
    static void enter() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack().bottom, &scheduler_stack().bytes);
#endif
    }

    [[noreturn]] void leave() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(nullptr, scheduler_stack().bottom, scheduler_stack().bytes);
#endif
        Context::swap(&context_, &scheduler());
        abort();  // a fibre that has left is never resumed
    }

  private:
    struct Bounds {
        const void* bottom;
        size_t bytes;
    };

#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kStackBytes = 256 << 10;
#else
    static constexpr size_t kStackBytes = 64 << 10;
#endif
    static constexpr size_t kGuardBytes = 4 << 10;
    // Stacks begin at different offsets in their pages: at the same one they would share a few lines of the
    // cache.
    static constexpr size_t kColours = 31;
    static constexpr size_t kColourBytes = 128;

    static Context& scheduler() {
        static Context context;
        return context;
    }

    static Bounds& scheduler_stack() {
        static Bounds bounds{};
        return bounds;
    }

    void allocate() {
        void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
            perror("stack of a simulated CUDA thread");
            abort();
        }
        stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
        static size_t fibres = 0;
        offset_ = fibres++ % kColours * kColourBytes;
    }

    Context context_;
    unsigned char* stack_ = nullptr;
    size_t offset_ = 0;
};

}  // namespace diffcam::shim
