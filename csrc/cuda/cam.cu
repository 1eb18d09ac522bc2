// cam on a GPU: weighting, pooling over channels, ReLU and normalisation in one launch, or two where a second
// has to add up partial maps.
//
// Every layout goes the same way. A block takes some channels at some positions of one image and target, a
// tile, into shared memory with asynchronous copies of 16 bytes; it sums and pools from there while the next
// tile arrives. That costs no registers for what is in flight (a tile, 20 to 36 KiB, for each of two or three
// blocks of a multiprocessor; 23 KiB would cover a latency of 0.7 us at 4.3 TB/s), takes rows of any
// alignment, 7x7 = 49 positions included, and lets every sum have the threads that suit it: some lanes a
// channel for weights, a thread a position for maps.
//
// Memory is the floor. An H200 issues 60 instructions of a warp while 32 float32 activations and gradients
// arrive, and 30 for bfloat16. A sum takes about 5 an element, pooling 6, copying less than 1; what a step
// costs whatever its size is spread over the 17 (float32) or 34 (bfloat16) pairs that a thread has in it.
//
// Activations and gradients are read from memory once. The L2 cache serves what is read again: activations,
// by every target of an image, and sectors that two rows share. One case reads activations a second time from
// wherever they are then: gradcam++ and xgradcam with weights formed apart, because neither a block nor a
// cluster of blocks has room for all positions of a channel (CamFlow::apart).
//
// An item, one map, is for one block where there are many. Otherwise, from capability 90 on, a cluster shares
// its channels or its positions and adds up sums, maps and extremes through shared memory; and where that is
// not enough, or clusters do not exist, blocks write partial maps for a second launch.
#include "cam_finish.h"
#include "diffcam/cam.h"

namespace diffcam {
namespace {

// Which tile a block takes next. Weights that no tile can make alone take a first pass over all positions of
// a chunk of channels; the second pass, for every tile of positions, adds the chunks to the map.
struct CamStep {
    int pass;
    int sum;  // of the first pass, where a second sum needs the total of another
    int chunk, tile;
};

template <typename E, CamFlow kFlow>
class CamBlock {
    using T = Accumulator<E>;
    static constexpr bool kSums = kFlow != CamFlow::stream;
    static constexpr bool kApart = kFlow == CamFlow::apart;

  public:
    __device__ __forceinline__ explicit CamBlock(const CamPlan& plan)
        : plan_(plan), rank_(plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0) {
        first_position_ = plan.share_positions ? min(rank_ * plan.block_positions, plan.positions) : 0;
        positions_ = min(plan.block_positions, plan.positions - first_position_);
        tiles_ = max(1, (positions_ + plan.tile - 1) / plan.tile);
    }

    __device__ __forceinline__ void run(int64_t item, int part) {
        begin(item, part);
        CamStep ahead = {kApart ? 0 : 1, 0, 0, 0}, step = ahead;
#pragma unroll 1
        for (int slot = 0; slot < kCamStages; ++slot) load_next(&ahead, slot);
        int slot = 0;
        while (step.pass < 2) {
            copy_async_wait<kCamStages - 1>();
            __syncthreads();
            use(step, slot);
            advance(&step);
            __syncthreads();
            load_next(&ahead, slot);
            slot = slot == kCamStages - 1 ? 0 : slot + 1;
        }
        if (plan_.parts == 1) finish(item);
        team_sync();  // nobody reads this block's shared memory any more
    }

  private:
    // ---- the sequence of tiles

    __device__ __forceinline__ bool sums_twice() const {
        return plan_.weights == CamWeights::plus_plus && !plan_.constant;
    }

    __device__ __forceinline__ void advance(CamStep* step) const {
        if (kApart && step->pass == 0) {
            if (++step->tile < tiles_) return;
            step->tile = 0;
            if (++step->sum < (sums_twice() ? 2 : 1)) return;
            step->sum = 0;
            if (++step->chunk < chunks_) return;
            *step = {1, 0, 0, 0};
        } else {
            if (++step->chunk < chunks_) return;
            step->chunk = 0;
            if (kFlow == CamFlow::fused || ++step->tile == tiles_) step->pass = 2;
        }
    }

    __device__ __forceinline__ CamRegion region(const CamStep& step) const {
        const int channel = step.chunk * plan_.chunk, position = step.tile * plan_.tile;
        return {first_channel_ + channel, first_position_ + position, min(plan_.chunk, channels_ - channel),
                min(plan_.tile, positions_ - position)};
    }

    __device__ __forceinline__ bool takes_activations(const CamStep& step) const {
        return !kApart || step.pass != 0 || (plan_.weights != CamWeights::mean && step.sum == 0);
    }

    __device__ __forceinline__ bool takes_gradients(const CamStep& step) const {
        if (plan_.constant) return false;
        if (!kApart) return true;
        if (step.pass != 0) return false;
        return plan_.weights != CamWeights::plus_plus || step.sum == 1;
    }

    __device__ __forceinline__ int gradients_slot(int slot) const {
        return slot * plan_.stage_bytes + plan_.activations.tile_bytes;
    }

    // Groups of copies are counted: one is committed for every step, also after the last.
    __device__ __forceinline__ void load_next(CamStep* step, int slot) const {
        if (step->pass < 2) {
            const CamRegion tile = region(*step);
            if (takes_activations(*step))
                load_tile(plan_, plan_.activations, activations_, tile, slot * plan_.stage_bytes);
            if (takes_gradients(*step))
                load_tile(plan_, plan_.gradients, gradients_, tile, gradients_slot(slot));
            advance(step);
        }
        copy_async_commit();
    }

    // ---- an item

    __device__ __forceinline__ T* shared_weights() const { return shared_at<T>(plan_.weights_at); }
    __device__ __forceinline__ T* shared_map() const { return shared_at<T>(plan_.map_at); }

    __device__ __forceinline__ void begin(int64_t item, int part) {
        const int64_t n = item / plan_.targets, t = item - n * plan_.targets;
        activations_ = static_cast<const E*>(plan_.activations.data) + n * plan_.activations.image;
        gradients_ = static_cast<const E*>(plan_.gradients.data) + n * plan_.gradients.image +
                     t * plan_.gradients.target;
        const int share = plan_.share_positions ? part : part * plan_.cluster + rank_;
        first_channel_ = min(share * plan_.block_channels, plan_.channels);
        channels_ = min(plan_.block_channels, plan_.channels - first_channel_);
        // Without channels the map is zero all the same.
        chunks_ = max(1, (channels_ + plan_.chunk - 1) / plan_.chunk);
        turn_ = 0;
        if (plan_.raw_in_shared)
            raw_ = shared_at<T>(plan_.raw_at);
        else if (plan_.parts > 1)
            raw_ = static_cast<T*>(plan_.partial) + (part * plan_.items + item) * plan_.positions +
                   first_position_;
        else
            raw_ = result(item) + first_position_;
        if (!plan_.constant) return;
        for (int c = static_cast<int>(threadIdx.x); c < channels_; c += kCamThreads) {
            const T gradient = widen(gradients_[(first_channel_ + c) * plan_.gradients.channel]);
            shared_weights()[c] = plan_.rectify_gradients ? rectified(gradient) : gradient;
        }
    }

    __device__ __forceinline__ T* result(int64_t item) const {
        return static_cast<T*>(plan_.maps) + item * plan_.positions;
    }

    __device__ __forceinline__ void team_sync() const {
        if (plan_.cluster > 1)
            cluster_sync();
        else
            __syncthreads();
    }

    __device__ __forceinline__ void use(const CamStep& step, int slot) {
        const CamRegion tile = region(step);
        const CamTile a = tile_of(plan_, plan_.activations, activations_, tile, slot * plan_.stage_bytes);
        CamTile g = a;
        if (!plan_.constant) g = tile_of(plan_, plan_.gradients, gradients_, tile, gradients_slot(slot));
        T* weights = shared_weights() + (plan_.keeps_weights ? step.chunk * plan_.chunk : 0);
        if constexpr (kApart) {
            if (step.pass == 0) return sum_apart(step, a, g, tile, weights);
        } else if constexpr (kSums) {
            sum_together(a, g, tile, weights);
        }
        add_to_map(a, g, tile, weights, step.chunk > 0);
        if (step.chunk == chunks_ - 1) flush(tile, step.tile * plan_.tile);
    }

    // ---- weights

    // Four arrays of sums for a chunk: of gradients, of their products with activations or of gradcam++'s
    // terms; of activations; and both again, for the next chunk. Then the totals of activations.
    __device__ __forceinline__ T* sums(int which) const {
        return shared_at<T>(plan_.sums_at) + (which * plan_.chunk << plan_.sum_segments);
    }

    __device__ __forceinline__ bool shares_sums() const {
        return kFlow == CamFlow::fused && plan_.share_positions;
    }

    __device__ __forceinline__ void sums_sync() const {
        if (shares_sums())
            cluster_sync();
        else
            __syncthreads();
    }

    // A channel's sum over its segments, and over the blocks of the cluster where they share the positions.
    __device__ __forceinline__ T total(T* sum, int channel) const {
        T value = 0;
        for (int segment = 0; segment < 1 << plan_.sum_segments; ++segment) {
            T* part = sum + (channel << plan_.sum_segments) + segment;
            if (!shares_sums()) value += *part;
            for (int rank = 0; shares_sums() && rank < plan_.cluster; ++rank)
                value += *cluster_peer(part, rank);
        }
        return value;
    }

    __device__ __forceinline__ void first_sums(const CamTile& a, const CamTile& g, const CamRegion& tile,
                                               bool add, int turn) const {
        const bool mean = plan_.weights == CamWeights::mean;
        CamTile summed = a;
        if (mean) summed = g;
        sum_positions<E>(plan_, summed, tile, add, sums(2 * turn + (mean ? 0 : 1)),
                         [](int, int, T x) { return x; });
        if (plan_.weights == CamWeights::cross && !plan_.constant) {
            const E* gradients = shared_at<E>(0) + g.start;
            sum_positions<E>(plan_, a, tile, add, sums(2 * turn), [=](int c, int s, T x) {
                return x * widen(gradients[c * g.channel + s * g.position]);
            });
        }
    }

    __device__ __forceinline__ void plus_plus_sums(const CamTile& g, const CamRegion& tile, bool add,
                                                   int turn) const {
        const T* totals = sums(4);
        sum_positions<E>(plan_, g, tile, add, sums(2 * turn),
                         [=](int c, int, T x) { return plus_plus_term(x, totals[c]); });
    }

    __device__ __forceinline__ void total_activations(int channels, int turn) const {
        for (int c = static_cast<int>(threadIdx.x); c < channels; c += kCamThreads)
            sums(4)[c] = total(sums(2 * turn + 1), c);
    }

    __device__ __forceinline__ void form_weights(int channels, int turn, T* weights) const {
        for (int c = static_cast<int>(threadIdx.x); c < channels; c += kCamThreads) {
            const bool cross = plan_.weights == CamWeights::cross;
            weights[c] = channel_weight(plan_, plan_.constant ? weights[c] : T(0),
                                        plan_.constant ? T(0) : total(sums(2 * turn), c),
                                        cross || plan_.constant ? total(sums(2 * turn + 1), c) : T(0));
        }
    }

    // All positions of a chunk are in this tile, or in those of the cluster. Its other blocks may still read
    // the sums of the chunk before, so sums take turns in two places.
    __device__ __forceinline__ void sum_together(const CamTile& a, const CamTile& g, const CamRegion& tile,
                                                 T* weights) {
        first_sums(a, g, tile, false, turn_);
        if (sums_twice()) {
            sums_sync();
            total_activations(tile.channels, turn_);
            __syncthreads();
            plus_plus_sums(g, tile, false, turn_);
        }
        sums_sync();
        form_weights(tile.channels, turn_, weights);
        __syncthreads();
        turn_ ^= 1;
    }

    // The first pass.
    __device__ __forceinline__ void sum_apart(const CamStep& step, const CamTile& a, const CamTile& g,
                                              const CamRegion& tile, T* weights) const {
        const bool last = step.tile == tiles_ - 1;
        if (step.sum == 0)
            first_sums(a, g, tile, step.tile > 0, 0);
        else
            plus_plus_sums(g, tile, step.tile > 0, 0);
        if (!last) return;
        __syncthreads();
        if (sums_twice() && step.sum == 0)
            total_activations(tile.channels, 0);
        else
            form_weights(tile.channels, 0, weights);
    }

    // ---- maps

    __device__ __forceinline__ void add_to_map(const CamTile& a, const CamTile& g, const CamRegion& tile,
                                               const T* weights, bool add) const {
        T* map = shared_map();
        if constexpr (kSums) {
            pool<E>(plan_, a, tile, add, map, [=](int c, int, T x) { return weights[c] * x; });
        } else if (plan_.constant) {
            const T least = rectifies(plan_.rectify_products);
            pool<E>(plan_, a, tile, add, map, [=](int c, int, T x) {
                const T product = weights[c] * x;
                return product < least ? T(0) : product;
            });
        } else {
            const T least_gradient = rectifies(plan_.rectify_gradients);
            const T least_product = rectifies(plan_.rectify_products);
            const E* gradients = shared_at<E>(0) + g.start;
            pool<E>(plan_, a, tile, add, map, [=](int c, int s, T x) {
                const T y = widen(gradients[c * g.channel + s * g.position]);
                const T product = x * (y < least_gradient ? T(0) : y);
                return product < least_product ? T(0) : product;
            });
        }
    }

    // What is less becomes zero; nothing is less than minus infinity.
    static __device__ __forceinline__ T rectifies(bool rectify) {
        return rectify ? T(0) : static_cast<T>(-INFINITY);
    }

    // A tile of the raw map is complete.
    __device__ __forceinline__ void flush(const CamRegion& tile, int begin) const {
        if (plan_.raw_in_shared && plan_.raw_at == plan_.map_at && plan_.pool_groups == 1) return;
        __syncthreads();
        for (int s = static_cast<int>(threadIdx.x); s < tile.positions; s += kCamThreads) {
            T value = shared_map()[s];
            for (int group = 1; group < plan_.pool_groups; ++group)
                value += shared_map()[group * tile.positions + s];
            raw_[begin + s] = value;
        }
    }

    __device__ __forceinline__ void finish(int64_t item) const {
        const bool adds = plan_.cluster > 1 && !plan_.share_positions;
        if (adds) cluster_sync();  // other blocks' maps are complete, as this block's is since the last tile
        int begin = first_position_, end = first_position_ + positions_;
        if (adds) {
            begin = static_cast<int>(int64_t{plan_.positions} * rank_ / plan_.cluster);
            end = static_cast<int>(int64_t{plan_.positions} * (rank_ + 1) / plan_.cluster);
        }
        const int shift = first_position_;
        finish_map(
            plan_, plan_.cluster, shared_at<CamExtremes<T>>(plan_.extremes_at), begin, end, result(item),
            [&](int s) {
                if (!adds) return raw_[s - shift];
                T value = 0;
                for (int rank = 0; rank < plan_.cluster; ++rank) value += *cluster_peer(raw_ + s, rank);
                return value;
            },
            [&](int s, T value) { raw_[s - shift] = value; }, [&](int s) { return raw_[s - shift]; });
    }

    const CamPlan& plan_;
    const int rank_;
    int first_position_, positions_, tiles_;
    int first_channel_, channels_, chunks_;
    int turn_;
    const E *activations_, *gradients_;
    T* raw_;
};

// Blocks of a multiprocessor; what is rare may take more registers instead.
template <typename E, CamFlow kFlow>
constexpr int kBlocks = sizeof(E) == 8 || kFlow == CamFlow::apart ? 2 : 3;

template <typename E, CamFlow kFlow>
__global__ void __launch_bounds__(kCamThreads, (kBlocks<E, kFlow>)) cam_kernel(const CamPlan plan) {
    CamBlock<E, kFlow> block(plan);
    const int64_t cluster = blockIdx.x / plan.cluster, clusters = gridDim.x / plan.cluster;
    for (int64_t i = cluster; i < plan.items * plan.parts; i += clusters)
        block.run(i / plan.parts, static_cast<int>(i % plan.parts));
}

template <typename T>
__global__ void __launch_bounds__(kCamThreads) cam_finish_kernel(const CamPlan plan) {
    const T* partial = static_cast<const T*>(plan.partial);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int64_t offset = item * plan.positions;
        T* map = static_cast<T*>(plan.maps) + offset;
        finish_map(
            plan, 1, shared_at<CamExtremes<T>>(0), 0, plan.positions, map,
            [&](int s) {
                T value = 0;
#pragma unroll 4
                for (int part = 0; part < plan.parts; ++part)
                    value += partial[part * plan.items * plan.positions + offset + s];
                return value;
            },
            [&](int s, T value) { map[s] = value; }, [&](int s) { return map[s]; });
        __syncthreads();
    }
}

template <typename E>
int launch_cam(const CamPlan& plan, const CudaQueue& queue) {
    using T = Accumulator<E>;
    // Enough clusters; beyond, each takes several items.
    const int64_t most = int64_t{4096} * queue.multiprocessors;
    const int64_t clusters = std::min(plan.items * plan.parts, most);
    const auto kernel = plan.flow == CamFlow::stream  ? cam_kernel<E, CamFlow::stream>
                        : plan.flow == CamFlow::fused ? cam_kernel<E, CamFlow::fused>
                                                      : cam_kernel<E, CamFlow::apart>;
    const int error = launch(kernel, dim3(static_cast<unsigned>(clusters * plan.cluster)), dim3(kCamThreads),
                             plan.shared_bytes, plan.cluster, queue.stream, plan);
    if (error != cudaSuccess || plan.parts == 1) return error;
    const int64_t bytes = (kCamWarps + 1) * sizeof(CamExtremes<T>);
    return launch(cam_finish_kernel<T>, dim3(static_cast<unsigned>(std::min(plan.items, most))),
                  dim3(kCamThreads), bytes, 1, queue.stream, plan);
}

bool is_empty(const CamShape& shape) {
    return shape.images == 0 || shape.targets == 0 || shape.extent.positions() == 0;
}

}  // namespace

int64_t cam_cuda_scratch_bytes(const CamShape& shape, const ConstView& activations,
                               const ConstView& gradients, CamMethod method, const CudaQueue& queue) {
    CamPlan plan;
    if (is_empty(shape) || !cam_plan(shape, activations, gradients, method, queue, &plan)) return 0;
    const int64_t sum_bytes = shape.type == ScalarType::float64 ? 8 : 4;
    return plan.parts == 1 ? 0 : plan.parts * plan.items * plan.positions * sum_bytes;
}

int cam_cuda(const CamShape& shape, const ConstView& activations, const ConstView& gradients,
             CamMethod method, bool relu, Normalization normalize, double eps, void* maps, void* scratch,
             const CudaQueue& queue) {
    if (is_empty(shape)) return cudaSuccess;
    CamPlan plan;
    if (!cam_plan(shape, activations, gradients, method, queue, &plan)) return cudaErrorInvalidValue;
    plan.relu = relu;
    plan.normalize = normalize;
    plan.eps = eps;
    plan.maps = maps;
    plan.partial = scratch;
    return with_element_type(shape.type,
                             [&](auto element) { return launch_cam<decltype(element)>(plan, queue); });
}

}  // namespace diffcam
