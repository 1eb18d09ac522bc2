// The gradient of raw maps on a GPU: one launch.
//
// A channel's gradients depend on that channel alone, so a block has some channels of one image. It copies
// their activations and gradients to shared memory, sums over positions where a method (or a gradient that
// all positions share) needs that, and computes the results from the same copies. So activations and
// gradients are read once and results written once; where there are several targets, or a block's copies do
// not fit, what is both summed and used is read once more, as a rule from a cache. What neither sums nor
// results need is not read at all: gradcam's gradient of the activations takes no activations.
//
// All sums are taken in an order that only shapes, strides and the device decide.
#include "cam_backward_plan.h"
#include "cam_backward_terms.h"
#include "diffcam/cam.h"

namespace diffcam {
namespace {

using namespace cam_backward_planning;

// Channels at their positions, in shared or global memory.
template <typename E, bool kWide>
struct Tile;

// Where wide accesses fit: strides are even.
template <typename E>
struct Tile<E, true> {
    const E* data;
    int64_t channel, position;
    __device__ __forceinline__ Tile(const E* data_, const Operand<const void>& operand, const Task&)
        : data(data_), channel(operand.channel), position(operand.position) {}
    __device__ __forceinline__ const E* at(int c, int s) const { return data + c * channel + s * position; }
};

__device__ __forceinline__ int64_t spatial_offset(const int64_t* strides, const int* extent, int s) {
    const int row = s / extent[2], plane = row / extent[1];
    return plane * strides[0] + (row - plane * extent[1]) * strides[1] + (s - row * extent[2]) * strides[2];
}

template <typename E>
struct Tile<E, false> {
    const E* data;
    const Operand<const void>& operand;
    const Task& task;
    __device__ __forceinline__ Tile(const E* data_, const Operand<const void>& operand_, const Task& task_)
        : data(data_), operand(operand_), task(task_) {}
    __device__ __forceinline__ const E* at(int c, int s) const {
        return data + c * operand.channel + spatial_offset(operand.spatial, task.extent, s);
    }
};

template <bool kWide, typename E>
__device__ __forceinline__ E* place(const Task& task, const Operand<void>& operand, E* data, int c, int s) {
    if constexpr (kWide) return data + c * operand.channel + s * operand.position;
    return data + c * operand.channel + spatial_offset(operand.spatial, task.extent, s);
}

// A block's part of the task.
template <typename E>
struct Chunk {
    using T = Accumulator<E>;
    int64_t image;
    int first, count;  // channels
    T* totals;         // of the activations of a channel
    T* offsets;
    T* partials;
    ChannelTerms<T>* terms;  // (targets, chunk)

    template <typename Element, typename Void>
    __device__ __forceinline__ Element* of(const Operand<Void>& operand, int target) const {
        return static_cast<Element*>(operand.data) + image * operand.image + target * operand.target +
               first * operand.channel;
    }
};

// Starts copying a chunk to shared memory, as it lies in global memory but without gaps.
template <typename E>
__device__ __forceinline__ void stage(const Task& task, const Operand<const void>& operand, int count,
                                      const E* from, unsigned char* shared) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(E));
    E* to = reinterpret_cast<E*>(shared);
    const int rows = task.channels_are_inner ? task.positions : 1;
    const int row = (task.channels_are_inner ? count : count * task.positions) / kVector;
    for (int i = static_cast<int>(threadIdx.x); i < rows * row; i += kThreads) {
        const int r = i / row, at = (i - r * row) * kVector;
        copy_async_16(to + r * task.chunk + at, from + r * operand.position + at);
    }
}

// The chunk at `data`, or its copy.
template <typename E, bool kWide>
__device__ __forceinline__ Tile<E, kWide> tile_of(const Task& task, const Operand<const void>& operand,
                                                  const E* data, bool staged, int at) {
    Tile<E, kWide> tile(data, operand, task);
    if constexpr (kWide) {
        if (staged) {
            tile.data = reinterpret_cast<const E*>(dynamic_shared() + at);
            tile.channel = task.channels_are_inner ? 1 : task.positions;
            tile.position = task.channels_are_inner ? task.chunk : 1;
        }
    }
    return tile;
}

__device__ __forceinline__ void finish_copies() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
}

// Sums over positions: add(channel, position, sum) adds to the calling thread's share, and finish(channel,
// sum) is called by thread `channel`.
template <int kSums, typename E, typename Add, typename Finish>
__device__ __forceinline__ void sum_positions(const Task& task, const Chunk<E>& chunk, Add add,
                                              Finish finish) {
    using T = Accumulator<E>;
    const int thread = static_cast<int>(threadIdx.x), parts = task.parts, lanes = task.lanes;
    const int groups = parts / lanes;
    // Neighbouring threads have neighbours in memory.
    const int c = task.channels_are_inner ? thread % task.chunk : thread / parts;
    const int part = task.channels_are_inner ? thread / task.chunk : thread % parts;
    T sums[kSums] = {};
    if (c < chunk.count && part < parts) {
        const int end = task.has_sums ? task.positions : 0;
        for (int s = part; s < end; s += parts) add(c, s, sums);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], distance);
    }
    if (c < chunk.count && part < parts && part % lanes == 0) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
            chunk.partials[(k * groups + part / lanes) * task.chunk + c] = sums[k];
        }
    }
    __syncthreads();
    if (thread < chunk.count) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] = 0;
        for (int p = 0; p < groups; ++p) {
#pragma unroll
            for (int k = 0; k < kSums; ++k) {
                sums[k] += chunk.partials[(k * groups + p) * task.chunk + thread];
            }
        }
        finish(thread, sums);
    }
    __syncthreads();
}

// Totals, offsets and terms of the chunk, and gradients of constant gradients.
template <typename E, bool kWide>
__device__ __forceinline__ void find_terms(const Task& task, const Chunk<E>& chunk,
                                           const Tile<E, kWide>& activations) {
    using T = Accumulator<E>;
    const T positions = static_cast<T>(task.positions);
    if (task.needs_total) {
        sum_positions<1>(
            task, chunk, [&](int c, int s, T* sums) { sums[0] += widen(*activations.at(c, s)); },
            [&](int c, const T* sums) { chunk.totals[c] = sums[0]; });
    }
    for (int t = 0; t < task.targets; ++t) {
        const T* grad_raw =
            static_cast<const T*>(task.grad_raw) + (chunk.image * task.targets + t) * task.positions;
        const E* data = chunk.template of<const E>(task.gradients, t);
        if (task.stages_gradients && t > 0) {
            stage(task, task.gradients, chunk.count, data, dynamic_shared() + task.gradients_at);
            finish_copies();
        }
        const Tile<E, kWide> gradients =
            tile_of<E, kWide>(task, task.gradients, data, task.stages_gradients, task.gradients_at);
        sum_positions<3>(
            task, chunk,
            [&](int c, int s, T* sums) {
                const T a = task.sums_activations ? widen(*activations.at(c, s)) : T(0);
                T g = 0;
                if (task.constant) {
                    if (task.method == CamMethod::elementwise) g = widen(data[c * task.gradients.channel]);
                } else if (task.sums_gradients) {
                    g = widen(*gradients.at(c, s));
                }
                ChannelSums<T> found{sums[0], sums[1], sums[2]};
                add_position(task.method, a, g, grad_raw[s], task.needs_total ? chunk.totals[c] : T(0),
                             found);
                sums[0] = found.weight;
                sums[1] = found.product;
                sums[2] = found.squares;
            },
            [&](int c, const T* sums) {
                const T total = task.needs_total ? chunk.totals[c] : T(0);
                ChannelTerms<T>& terms = chunk.terms[t * task.chunk + c];
                if (!task.constant) {
                    terms = terms_of(task.method, {sums[0], sums[1], sums[2]}, total, positions,
                                     chunk.offsets[c]);
                    return;
                }
                T result;
                const T g = widen(data[c * task.gradients.channel]);
                terms =
                    terms_of_constant(task.method, g, sums[1], total, positions, chunk.offsets[c], result);
                if (task.grad_gradients.data != nullptr) {
                    narrow(result,
                           chunk.template of<E>(task.grad_gradients, t) + c * task.grad_gradients.channel);
                }
            });
    }
}

// The results, a 16-byte access at a time where these fit. Neighbours are positions, which run on into the
// next channel, or channels at one position.
template <CamMethod kMethod, typename E, bool kWide>
__device__ __forceinline__ void store_results(const Task& task, const Chunk<E>& chunk,
                                              const Tile<E, kWide>& activations) {
    using T = Accumulator<E>;
    constexpr int kCount = kWide ? 16 / static_cast<int>(sizeof(E)) : 1;
    using Elements = Pack<E, kCount>;
    const bool for_activations = task.grad_activations.data != nullptr;
    const bool for_gradients = task.grad_gradients.data != nullptr && !task.constant;
    const int inner = task.channels_are_inner ? chunk.count : task.positions;
    const int packs = chunk.count * task.positions / kCount;
    for (int pack = static_cast<int>(threadIdx.x); pack < packs; pack += kThreads) {
        const int outer = pack * kCount / inner, begin = pack * kCount - outer * inner;
        // Calls body(k, channel, position) for each element.
        const auto for_elements = [&](auto body) {
            int i = outer, j = begin;
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                body(k, task.channels_are_inner ? j : i, task.channels_are_inner ? i : j);
                if (++j == inner) {
                    j = 0;
                    ++i;
                }
            }
        };
        const int c = task.channels_are_inner ? begin : outer, s = task.channels_are_inner ? outer : begin;
        Elements a = {};
        if (task.uses_activations) a = *reinterpret_cast<const Elements*>(activations.at(c, s));
        T sum[kCount];
        for_elements([&](int k, int channel, int) { sum[k] = chunk.offsets[channel]; });
#pragma unroll 1
        for (int t = 0; t < task.targets; ++t) {
            const T* grad_raw =
                static_cast<const T*>(task.grad_raw) + (chunk.image * task.targets + t) * task.positions;
            Elements g = {};
            if (task.uses_gradients) {
                const Tile<E, kWide> gradients =
                    tile_of<E, kWide>(task, task.gradients, chunk.template of<const E>(task.gradients, t),
                                      task.stages_gradients && task.targets == 1, task.gradients_at);
                g = *reinterpret_cast<const Elements*>(gradients.at(c, s));
            }
            Elements results;
            for_elements([&](int k, int channel, int position) {
                ChannelTerms<T> terms{0, 0};
                if (task.has_terms) terms = chunk.terms[t * task.chunk + channel];
                const T total = task.needs_total ? chunk.totals[channel] : T(0);
                const T x = widen(a.element[k]), y = task.constant ? terms.weight : widen(g.element[k]);
                const T r = grad_raw[position];
                if (for_activations) sum[k] += of_activation(kMethod, task.constant, x, y, r, terms);
                if (for_gradients) narrow(of_gradient(kMethod, x, y, r, total, terms), &results.element[k]);
            });
            if (for_gradients) {
                E* to = chunk.template of<E>(task.grad_gradients, t);
                *reinterpret_cast<Elements*>(place<kWide>(task, task.grad_gradients, to, c, s)) = results;
            }
        }
        if (for_activations) {
            Elements results;
#pragma unroll
            for (int k = 0; k < kCount; ++k) narrow(sum[k], &results.element[k]);
            E* to = chunk.template of<E>(task.grad_activations, 0);
            *reinterpret_cast<Elements*>(place<kWide>(task, task.grad_activations, to, c, s)) = results;
        }
    }
}

template <typename E, bool kWide>
__global__ void __launch_bounds__(kThreads, kWide && sizeof(E) == 2 ? 2 : 3)
    cam_backward_kernel(const __grid_constant__ Task task) {
    using T = Accumulator<E>;
    unsigned char* shared = dynamic_shared();
    const int chunks = (task.channels + task.chunk - 1) / task.chunk;
    Chunk<E> chunk;
    chunk.image = blockIdx.x / static_cast<unsigned>(chunks);
    chunk.first = static_cast<int>(blockIdx.x % static_cast<unsigned>(chunks)) * task.chunk;
    chunk.count = min(task.chunk, task.channels - chunk.first);
    chunk.totals = reinterpret_cast<T*>(shared);
    chunk.offsets = chunk.totals + task.chunk;
    chunk.partials = chunk.offsets + task.chunk;
    chunk.terms = task.terms_in_shared ? reinterpret_cast<ChannelTerms<T>*>(shared + task.terms_at)
                                       : static_cast<ChannelTerms<T>*>(task.scratch) +
                                             int64_t{blockIdx.x} * task.targets * task.chunk;

    const E* data = chunk.template of<const E>(task.activations, 0);
    if (task.stages_activations)
        stage(task, task.activations, chunk.count, data, shared + task.activations_at);
    if (task.stages_gradients && task.targets > 0) {
        stage(task, task.gradients, chunk.count, chunk.template of<const E>(task.gradients, 0),
              shared + task.gradients_at);
    }
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < chunk.count) chunk.offsets[thread] = 0;
    finish_copies();
    const auto activations =
        tile_of<E, kWide>(task, task.activations, data, task.stages_activations, task.activations_at);
    if (task.has_terms) find_terms(task, chunk, activations);
    switch (task.method) {
        case CamMethod::gradcam:
            return store_results<CamMethod::gradcam>(task, chunk, activations);
        case CamMethod::gradcam_plus_plus:
            return store_results<CamMethod::gradcam_plus_plus>(task, chunk, activations);
        case CamMethod::xgradcam:
            return store_results<CamMethod::xgradcam>(task, chunk, activations);
        case CamMethod::hirescam:
            return store_results<CamMethod::hirescam>(task, chunk, activations);
        case CamMethod::layercam:
            return store_results<CamMethod::layercam>(task, chunk, activations);
        case CamMethod::elementwise:
            return store_results<CamMethod::elementwise>(task, chunk, activations);
    }
}

}  // namespace

int64_t cam_backward_cuda_scratch_bytes(const CamShape& shape, const ConstView&, const ConstView&,
                                        CamMethod method, bool, bool, const CudaQueue& queue) {
    if (!has_terms(shape, method) || terms_fit(shape, queue)) return 0;
    // The last block of an image has terms for more channels than there are.
    return shape.images * shape.targets * (shape.channels + kMostChunk) * 2 * accumulator_bytes(shape.type);
}

int cam_backward_cuda(const CamShape& shape, const void* grad_raw, const ConstView& activations,
                      const ConstView& gradients, CamMethod method, const View& grad_activations,
                      const View& grad_gradients, void* scratch, const CudaQueue& queue) {
    const int64_t positions = shape.extent.positions();
    if (shape.channels > kMostChannels || shape.targets > kMostChannels || positions > kMostPositions) {
        return cudaErrorInvalidValue;
    }
    if (shape.images == 0 || shape.channels == 0) return cudaSuccess;
    Task task{};
    task.activations = operand_of<const void>(activations, shape.extent);
    task.gradients = operand_of<const void>(gradients, shape.extent);
    task.grad_activations = operand_of<void>(grad_activations, shape.extent);
    task.grad_gradients = operand_of<void>(grad_gradients, shape.extent);
    task.grad_raw = grad_raw;
    task.scratch = scratch;
    task.targets = static_cast<int>(shape.targets);
    task.channels = static_cast<int>(shape.channels);
    task.positions = static_cast<int>(positions);
    for (int d = 0; d < kSpatialRank; ++d) task.extent[d] = static_cast<int>(shape.extent.size[d]);
    task.method = method;
    task.constant = shape.constant_gradients;
    plan_reading(shape, task);

    Layouts layouts{positions > 0, positions > 0};
    restrict_layouts(task.activations, shape, false, layouts);
    if (grad_activations.data != nullptr) restrict_layouts(task.grad_activations, shape, false, layouts);
    if (!task.constant) {
        restrict_layouts(task.gradients, shape, true, layouts);
        if (grad_gradients.data != nullptr) restrict_layouts(task.grad_gradients, shape, true, layouts);
    }
    const bool wide = layouts.planar || layouts.interleaved;
    const int64_t shared_bytes = plan_blocks(shape, queue, layouts, wide, task);
    const int64_t blocks = shape.images * ceil_div(shape.channels, task.chunk);
    if (blocks > kMostBlocks) return cudaErrorInvalidValue;
    return with_element_type(shape.type, [&](auto value) {
        using E = decltype(value);
        const auto kernel = wide ? cam_backward_kernel<E, true> : cam_backward_kernel<E, false>;
        return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes, 1,
                      queue.stream, task);
    });
}

}  // namespace diffcam
