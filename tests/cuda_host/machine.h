// A simulated device: runs the blocks of a launch as fibres of one host thread, in an order drawn from a
// seed.
//
// A thread runs until it waits for others, so what one does between two waits is never seen half done.
// Between waits the order is meant to be unkind: warps of several blocks get random priorities, so that one
// may be far ahead of another, and lanes run in random order. Code that lacks a barrier then reads what is
// not yet written, or what has already been overwritten, for some seed.
#pragma once

#include <stdarg.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "diagnostics.h"
#include "machine_state.h"

namespace diffcam::shim {

class Machine {
  public:
    void seed(uint64_t seed) { random_.seed(seed); }

    // What launches are checked against.
    void set_device(int capability, int64_t shared_bytes) {
        capability_ = capability;
        shared_limit_ = shared_bytes;
    }

    int enqueue(Launch launch) {
        const int error = check(launch);
        if (error == cudaSuccess) queue_.push_back(std::move(launch));
        return error;
    }

    // Keeps a text that explains an error found outside a launch.
    int refuse(const char* text) {
        failure_ = text;
        queue_.clear();
        return cudaErrorLaunchFailure;
    }

    // Runs what was queued. Returns 0, or an error code that error_text() explains.
    int synchronize() {
        failure_.clear();
        finished_launches_ = 0;
        for (const Launch& launch : queue_) {
            run(launch);
            if (!failure_.empty()) break;
            ++finished_launches_;
        }
        queue_.clear();
        return failure_.empty() ? cudaSuccess : cudaErrorLaunchFailure;
    }

    const char* error_text() const { return failure_.c_str(); }
    int finished_launches() const { return finished_launches_; }  // of the last synchronize()

    // Every barrier and wait that has been reached, as "file:line" separated by spaces.
    std::string sites() const {
        std::string text;
        for (const auto& [path, line] : sites_) {
            text += std::string(file_name(path)) + ":" + std::to_string(line) + " ";
        }
        return text;
    }

    // Makes one barrier or wait do nothing; line 0 for none.
    void leave_out(const char* file, int line) {
        left_out_file_ = file;
        left_out_line_ = line;
    }

    // The rest is for code that runs as a simulated thread.

    bool leaves_out(const char* path, int line) {
        sites_.emplace(path, line);
        return line == left_out_line_ && left_out_file_ == file_name(path);
    }

    Thread& thread() { return *current_; }
    Block& block() { return *current_->warp->block; }
    int64_t shared_bytes() const { return launch_->shared_bytes; }

    void block_barrier() {
        ++block().at_barrier;
        wait(State::block_barrier);
    }

    void cluster_barrier() {
        ++block().cluster->at_barrier;
        wait(State::cluster_barrier);
    }

    // Meets the lanes that mask names in the same call with the same mask.
    uint64_t warp_call(WarpCall call, unsigned mask, uint64_t value, int source_lane) {
        Thread& self = *current_;
        Warp& warp = *self.warp;
        if ((mask >> self.lane & 1) == 0) {
            fail("lane %u calls with mask %08x, which does not name it", self.lane, mask);
        }
        self.call = call;
        self.mask = mask;
        self.value = value;
        self.source_lane = source_lane;
        self.state = State::warp_call;
        warp.waiting |= 1u << self.lane;
        if (all_there(warp, mask)) complete_warp_call(warp, mask);
        self.fibre->suspend();
        return self.result;
    }

    // Lets other warps overtake here, now and then.
    void preempt() {
        if (!random_.one_in(4)) return;
        current_->warp->ready |= 1u << current_->lane;
        overtaken_ = current_->warp;
        current_->fibre->suspend();
    }

    // Ends the launch with an error.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        char text[512];
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        const Block& at = block();
        set_failure("thread (%u, %u, %u) of block (%u, %u, %u): %s", current_->index.x, current_->index.y,
                    current_->index.z, at.index.x, at.index.y, at.index.z, text);
        current_->fibre->suspend();
        abort();  // the scheduler stops at a failure
    }

  private:
    static constexpr unsigned kMostResidentClusters = 4;
    static constexpr unsigned kResidentThreads = 2048;
    static constexpr uint32_t kFallsBack = 64;  // one in so many turns of a warp
    static constexpr size_t kGuardBytes = 64;
    static constexpr unsigned char kGuard = 0xa5;

    static const char* file_name(const char* path) {
        const char* slash = strrchr(path, '/');
        return slash == nullptr ? path : slash + 1;
    }

    __attribute__((format(printf, 2, 3))) void set_failure(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        char text[1024];
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        if (failure_.empty()) failure_ = text;
    }

    int check(const Launch& launch) {
        const char* wrong = refusal(launch, capability_, shared_limit_);
        if (wrong == nullptr) return cudaSuccess;
        failure_.clear();
        set_failure("launch of grid (%u, %u, %u), block (%u, %u, %u), %lld bytes, clusters of %u: %s",
                    launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y,
                    launch.block.z, static_cast<long long>(launch.shared_bytes), launch.cluster, wrong);
        return cudaErrorInvalidConfiguration;
    }

    void run(const Launch& launch) {
        launch_ = &launch;
        blockDim = launch.block;
        gridDim = launch.grid;
        const unsigned per_cluster = threads_of(launch.block) * launch.cluster;
        waiting_clusters_.resize(uint64_t{launch.grid.x / launch.cluster} * launch.grid.y * launch.grid.z);
        for (size_t i = 0; i < waiting_clusters_.size(); ++i) {
            waiting_clusters_[i] = i;
            std::swap(waiting_clusters_[i], waiting_clusters_[random_.below(i + 1)]);
        }
        const size_t most = max(1u, min(kMostResidentClusters, kResidentThreads / per_cluster));
        clusters_.clear();
        clusters_.resize(min(most, waiting_clusters_.size()));
        while (fibres_.size() < clusters_.size() * per_cluster) fibres_.push_back(std::make_unique<Fibre>());
        order_.clear();
        size_t fibre = 0;
        for (Cluster& cluster : clusters_) {
            build(cluster, fibre);
            admit(cluster);
        }
        schedule();
        for (Cluster& cluster : clusters_) {
            for (Block& block : cluster.blocks) free_shared(block);
        }
    }

    // Lays out a resident cluster, once a launch.
    void build(Cluster& cluster, size_t& fibre) {
        const unsigned threads = threads_of(launch_->block);
        cluster.blocks.resize(launch_->cluster);
        cluster.threads.resize(launch_->cluster * threads);
        cluster.warps.resize(cluster.threads.size() / kLanes);
        for (size_t i = 0; i < cluster.threads.size(); ++i) {
            const unsigned in_block = i % threads;
            Thread& thread = cluster.threads[i];
            thread.fibre = fibres_[fibre++].get();
            thread.index = {in_block % launch_->block.x, in_block / launch_->block.x % launch_->block.y,
                            in_block / launch_->block.x / launch_->block.y};
            thread.lane = in_block % kLanes;
            thread.warp = &cluster.warps[i / kLanes];
        }
        for (size_t i = 0; i < cluster.warps.size(); ++i) {
            cluster.warps[i].block = &cluster.blocks[i * kLanes / threads];
            cluster.warps[i].lanes = &cluster.threads[i * kLanes];
            order_.push_back(&cluster.warps[i]);
        }
        for (unsigned rank = 0; rank < launch_->cluster; ++rank) {
            cluster.blocks[rank].cluster = &cluster;
            cluster.blocks[rank].rank = rank;
            cluster.blocks[rank].threads = &cluster.threads[rank * threads];
            cluster.blocks[rank].shared = nullptr;
        }
    }

    // Starts the next waiting cluster of blocks in the place of one that ended.
    void admit(Cluster& cluster) {
        const uint64_t number = waiting_clusters_.back();
        waiting_clusters_.pop_back();
        const unsigned along_x = launch_->grid.x / launch_->cluster;
        cluster.live = static_cast<unsigned>(cluster.threads.size());
        cluster.at_barrier = 0;
        for (Block& block : cluster.blocks) {
            block.index = {static_cast<unsigned>(number % along_x) * launch_->cluster + block.rank,
                           static_cast<unsigned>(number / along_x % launch_->grid.y),
                           static_cast<unsigned>(number / along_x / launch_->grid.y)};
            block.started = false;
            block.live = threads_of(launch_->block);
            block.at_barrier = 0;
            allocate_shared(block);
        }
        for (Thread& thread : cluster.threads) {
            thread.state = State::ready;
            thread.copies.clear();
            thread.open_group = 0;
            thread.fibre->start(&Machine::thread_main);
        }
        for (Warp& warp : cluster.warps) {
            warp.ready = ~0u;
            warp.waiting = 0;
        }
        // A place at random for each of its warps; the others keep theirs among themselves.
        for (Warp& warp : cluster.warps) {
            const auto now = std::find(order_.begin(), order_.end(), &warp);
            move(static_cast<size_t>(now - order_.begin()), random_.below(order_.size()));
        }
    }

    // Exactly the bytes asked for under the address sanitizer, which sees accesses beyond them. Otherwise a
    // guard follows, which shows writes.
    void allocate_shared(Block& block) {
        const size_t bytes = static_cast<size_t>(launch_->shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
        const size_t guard = 0;
#else
        const size_t guard = kGuardBytes;
#endif
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, max<size_t>(bytes + guard, 1)) != 0) abort();
        block.shared = static_cast<unsigned char*>(memory);
        memset(block.shared, kPoison, bytes);
        memset(block.shared + bytes, kGuard, guard);
    }

    void free_shared(Block& block) {
        if (block.shared == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(block.shared, static_cast<size_t>(launch_->shared_bytes));
#else
        for (size_t i = 0; i < kGuardBytes; ++i) {
            if (block.shared[launch_->shared_bytes + static_cast<int64_t>(i)] != kGuard) {
                set_failure("block (%u, %u, %u) wrote beyond its %lld bytes of shared memory", block.index.x,
                            block.index.y, block.index.z, static_cast<long long>(launch_->shared_bytes));
            }
        }
#endif
        free(block.shared);
        block.shared = nullptr;
    }

    // A peer must not read the shared memory of a block that has ended.
    void retire(Block& block) {
        memset(block.shared, kPoison, static_cast<size_t>(launch_->shared_bytes));
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(block.shared, static_cast<size_t>(launch_->shared_bytes));
#endif
    }

    void schedule() {
        size_t running = clusters_.size();
        while (running > 0) {
            Warp* warp = next_warp();
            if (warp == nullptr) return set_failure("%s", deadlock_text(clusters_).c_str());
            run_warp(*warp);
            if (!failure_.empty()) return;
            Cluster& cluster = *warp->block->cluster;
            if (cluster.live > 0) continue;
            for (Block& block : cluster.blocks) free_shared(block);
            if (!failure_.empty()) return;
            if (waiting_clusters_.empty()) {
                --running;
            } else {
                admit(cluster);
            }
        }
    }

    // The first in order that can run. Now and then a warp falls back in the order.
    Warp* next_warp() {
        for (size_t i = 0; i < order_.size();) {
            Warp* warp = order_[i];
            if (warp->ready == 0) {
                ++i;
            } else if (warp == overtaken_ || random_.one_in(kFallsBack)) {
                overtaken_ = nullptr;
                move(i, i + random_.below(order_.size() - i));
            } else {
                return warp;
            }
        }
        return nullptr;
    }

    void move(size_t from, size_t to) {
        Warp* warp = order_[from];
        order_.erase(order_.begin() + static_cast<ptrdiff_t>(from));
        order_.insert(order_.begin() + static_cast<ptrdiff_t>(to), warp);
    }

    // Each ready lane runs once, in random order; now and then only some of them.
    void run_warp(Warp& warp) {
        uint32_t lanes = warp.ready;
        if (random_.one_in(8)) {
            const uint32_t some = lanes & random_.bits();
            if (some != 0) lanes = some;
        }
        warp.ready &= ~lanes;
        Block& block = *warp.block;
        if (!block.started) {
            block.started = true;
            // Again: what a peer wrote before this block was known to run is lost.
            memset(block.shared, kPoison, static_cast<size_t>(launch_->shared_bytes));
        }
        blockIdx = block.index;
        const unsigned first = random_.bits();
        const unsigned step = random_.bits() | 1;  // odd: comes by every lane
        for (unsigned i = 0; i < kLanes; ++i) {
            const unsigned lane = (first + i * step) % kLanes;
            if ((lanes >> lane & 1) == 0) continue;
            current_ = &warp.lanes[lane];
            threadIdx = current_->index;
            current_->fibre->resume();
            if (!failure_.empty()) return;
        }
    }

    void wait(State state) {
        Thread& self = *current_;
        self.state = state;
        release_barriers(*self.warp->block);
        self.fibre->suspend();
    }

    // Threads that have ended count as arrived.
    void release_barriers(Block& block) {
        if (block.live > 0 && block.at_barrier == block.live) {
            block.at_barrier = 0;
            release(block.threads, threads_of(launch_->block), State::block_barrier);
        }
        Cluster& cluster = *block.cluster;
        if (cluster.live > 0 && cluster.at_barrier == cluster.live) {
            cluster.at_barrier = 0;
            release(cluster.threads.data(), cluster.threads.size(), State::cluster_barrier);
        }
    }

    static void release(Thread* threads, size_t count, State state) {
        for (Thread* thread = threads; thread != threads + count; ++thread) {
            if (thread->state != state) continue;
            thread->state = State::ready;
            thread->warp->ready |= 1u << thread->lane;
        }
    }

    bool all_there(const Warp& warp, unsigned mask) {
        if ((warp.waiting & mask) != mask) return false;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if ((mask >> lane & 1) == 0) continue;
            if (warp.lanes[lane].mask != mask) return false;
            if (warp.lanes[lane].call != current_->call) {
                fail("lanes %u and %u of a warp meet in different calls", current_->lane, lane);
            }
        }
        return true;
    }

    void complete_warp_call(Warp& warp, unsigned mask) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if ((mask >> lane & 1) != 0 && warp.lanes[lane].value != 0) votes |= 1u << lane;
        }
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if ((mask >> lane & 1) == 0) continue;
            Thread& thread = warp.lanes[lane];
            switch (thread.call) {
                case WarpCall::sync:
                    thread.result = 0;
                    break;
                case WarpCall::ballot:
                    thread.result = votes;
                    break;
                case WarpCall::any:
                    thread.result = votes != 0;
                    break;
                case WarpCall::all:
                    thread.result = votes == mask;
                    break;
                case WarpCall::shuffle:
                    // From a lane that takes no part comes anything.
                    thread.result = (mask >> thread.source_lane & 1) != 0
                                        ? warp.lanes[thread.source_lane].value
                                        : ~uint64_t{0};
                    break;
            }
            thread.state = State::ready;
        }
        warp.waiting &= ~mask;
        warp.ready |= mask;
    }

    static void thread_main();

    void end_thread() {
        Thread& self = *current_;
        for (const Copy& copy : self.copies) memcpy(copy.shared, copy.global, 16);
        self.state = State::exited;
        Block& block = *self.warp->block;
        --block.live;
        --block.cluster->live;
        if (block.live == 0) retire(block);
        release_barriers(block);
        self.fibre->leave();
    }

    Random random_;
    int capability_ = 100;
    int64_t shared_limit_ = 227 << 10;
    std::vector<Launch> queue_;
    std::string failure_;
    int finished_launches_ = 0;
    std::set<std::pair<const char*, int>> sites_;
    std::string left_out_file_;
    int left_out_line_ = 0;

    const Launch* launch_ = nullptr;
    std::vector<uint64_t> waiting_clusters_;
    std::vector<Cluster> clusters_;
    std::vector<std::unique_ptr<Fibre>> fibres_;
    std::vector<Warp*> order_;
    Warp* overtaken_ = nullptr;
    Thread* current_ = nullptr;
};

inline Machine& machine() {
    static Machine machine;
    return machine;
}

inline void Machine::thread_main() {
    Fibre::enter();
    Machine& self = machine();
    self.launch_->body();
    self.end_thread();
}

}  // namespace diffcam::shim
