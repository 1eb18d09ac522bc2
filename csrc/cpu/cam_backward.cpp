// cam_backward_cpu: the gradient of the raw maps. A channel's gradients depend on that channel alone, so
// tasks are blocks of channels: first the sums over their positions, then, tile by tile, the gradients
// themselves.
#include "cpu/cam_backward.h"

#include <algorithm>

#include "cpu/cam_source.h"
#include "diffcam/cpu_capability.h"

namespace diffcam {
namespace {

constexpr int64_t kTileElements = 8192;     // results of a tile stay in the first two levels of cache
constexpr int64_t kCoefficients = 16384;    // weights of a block of channels, all targets
constexpr int64_t kBlockBytes = 128 << 10;  // activations of a block of planes stay in the second-level cache

template <typename T>
class CamBackward {
  public:
    CamBackward(const CamShape& shape, const T* grad_raw, const ConstView& activations,
                const ConstView& gradients, CamMethod method, const View& grad_activations,
                const View& grad_gradients, const Parallel& parallel)
        : shape_(shape),
          positions_(shape.extent.positions()),
          method_(method),
          grad_raw_(grad_raw),
          grad_activations_(grad_activations),
          grad_gradients_(grad_gradients),
          parallel_(parallel),
          activations_(cam_source(activations, shape)),
          gradients_(cam_source(gradients, shape)),
          activations_out_(layout_of(grad_activations, shape)),
          gradients_out_(layout_of(grad_gradients, shape)),
          constant_(shape.constant_gradients),
          weighted_(method == CamMethod::gradcam || method == CamMethod::xgradcam ||
                    method == CamMethod::gradcam_plus_plus),
          planar_(!(activations_.interleaved && (constant_ || gradients_.interleaved)) ||
                  (activations_.planar && (constant_ || gradients_.planar))) {
        const int index = static_cast<int>(shape.type);
        forward_ = standard::cam_kernels + index;
        kernels_ = standard::cam_backward_kernels + index;
#if defined(__x86_64__)
        if (cpu_capability() == CpuCapability::avx512) {
            forward_ = avx512::cam_kernels + index;
            kernels_ = avx512::cam_backward_kernels + index;
        } else if (cpu_capability() == CpuCapability::avx2) {
            forward_ = avx2::cam_kernels + index;
            kernels_ = avx2::cam_backward_kernels + index;
        }
#endif
    }

    void run() {
        const int64_t bytes = activations_.bytes;
        block_ = planar_ ? kBlockBytes / std::max<int64_t>(positions_ * bytes, 1) / 16 * 16 : 512;
        block_ = std::min(block_, kCoefficients / std::max<int64_t>(shape_.targets, 1) / 16 * 16);
        block_ = std::min(std::max<int64_t>(block_, 16), shape_.channels);
        const int64_t blocks = ceil_div(shape_.channels, block_), tasks = shape_.images * blocks;
        const int64_t per_position = shape_.channels * positions_ * bytes;
        const int64_t traffic = shape_.images * per_position * (2 + (constant_ ? 0 : 2 * shape_.targets));
        const int64_t workers =
            std::max<int64_t>(1, std::min({int64_t{parallel_.threads}, tasks, traffic / kBytesPerThread}));

        const int64_t coefficients = shape_.targets * block_;
        const int64_t values = 3 * coefficients + 2 * block_ + kTileElements;
        const bool copies = planar_ && !(activations_.planar && (constant_ || gradients_.planar));
        const int64_t tile_bytes = copies ? kTileElements * bytes : 0;
        Scratch<T> scratch(workers * values);
        Scratch<char> tiles(workers * 2 * tile_bytes);
        run_tasks(parallel_, workers, tasks, [&](int64_t index, int64_t task) {
            T* memory = scratch.get() + index * values;
            char* copy = tiles.get() + index * 2 * tile_bytes;
            Worker worker = {memory,
                             memory + coefficients,
                             memory + 2 * coefficients,
                             memory + 3 * coefficients,
                             memory + 3 * coefficients + block_,
                             memory + 3 * coefficients + 2 * block_,
                             {copy, copy + tile_bytes}};
            const int64_t n = task / blocks, first = task % blocks * block_;
            run_block(worker, n, first, std::min(block_, shape_.channels - first));
        });
    }

  private:
    struct Worker {
        T* weights;  // (targets, channels of the block): what the map's terms are multiplied with
        T* slopes;   // gradient of a scalar with respect to the weights, then what the method makes of it
        T* results;  // gradients of gradients that are the same at every position
        T* activation_sums;  // (channels)
        T* offsets;          // added to the gradient of every activation of a channel
        T* tile;
        char* copies[2];
    };

    static CamSource layout_of(const View& view, const CamShape& shape) {
        ConstView same = {view.data, view.image_stride, view.target_stride, view.channel_stride, {}};
        std::copy(view.spatial_stride, view.spatial_stride + kSpatialRank, same.spatial_stride);
        return cam_source(same, shape);
    }

    const T* grad_raw(int64_t n, int64_t t) const {
        return grad_raw_ + (n * shape_.targets + t) * positions_;
    }

    CamTile tile_of(const Worker& worker, int buffer, const CamSource& source, const char* data, int64_t c,
                    int64_t channels, int64_t s, int64_t positions) const {
        const char* start = data + c * source.channel * source.bytes;
        if (!planar_)
            return {start + s * source.position * source.bytes, source.channel, source.position, false};
        if (source.planar) return {start + s * source.bytes, source.channel, 1, true};
        forward_->copy_tile(start, source.channel, source.spatial, shape_.extent.size, channels, s, positions,
                            worker.copies[buffer]);
        return {worker.copies[buffer], positions, 1, true};
    }

    // Calls body(first channel, channels, first position, positions) until a block of channels is covered.
    template <typename Body>
    void for_tiles(int64_t channels, bool whole, Body&& body) const {
        if (whole) return body(int64_t{0}, channels, int64_t{0}, positions_);
        const int64_t span =
            planar_ ? std::min<int64_t>(positions_, 1024) : std::max<int64_t>(kTileElements / channels, 1);
        const int64_t most = planar_ ? kTileElements / span : channels;
        for (int64_t c = 0; c < channels; c += most)
            for (int64_t s = 0; s < positions_; s += span)
                body(c, std::min(most, channels - c), s, std::min(span, positions_ - s));
    }

    bool readable(const CamSource& source) const { return !planar_ || source.planar; }

    // sums[c] = sum_s of what `kind` says of x.
    void sum(const Worker& worker, CamBackwardSum kind, const CamSource& x, const char* data,
             const T* grad_raw, const T* p, int64_t channels, T* sums) const {
        for_tiles(channels, readable(x), [&](int64_t c, int64_t count, int64_t s, int64_t length) {
            kernels_->sums(kind, tile_of(worker, 0, x, data, c, count, s, length),
                           grad_raw == nullptr ? nullptr : grad_raw + s, p == nullptr ? nullptr : p + c,
                           count, length, s > 0, sums + c);
        });
    }

    void forward_sum(const Worker& worker, CamSum kind, const CamSource& x, const char* x_data,
                     const CamSource& y, const char* y_data, int64_t channels, T* sums) const {
        for_tiles(
            channels, readable(x) && readable(y), [&](int64_t c, int64_t count, int64_t s, int64_t length) {
                const CamTile first = tile_of(worker, 0, x, x_data, c, count, s, length);
                const CamTile second =
                    kind == CamSum::product ? tile_of(worker, 1, y, y_data, c, count, s, length) : first;
                forward_->channel_sums(kind, first, second, worker.activation_sums + c, count, length, s > 0,
                                       sums + c, nullptr);
            });
    }

    void run_block(const Worker& worker, int64_t n, int64_t first, int64_t channels) const {
        const char* a_data = activations_.at(n, 0, first);
        std::fill(worker.offsets, worker.offsets + channels, T(0));
        if (method_ == CamMethod::xgradcam || method_ == CamMethod::gradcam_plus_plus)
            forward_sum(worker, CamSum::plain, activations_, a_data, activations_, a_data, channels,
                        worker.activation_sums);
        if (weighted_ || constant_)
            for (int64_t t = 0; t < shape_.targets; ++t)
                find_coefficients(worker, n, t, first, channels, a_data);
        if (grad_activations_.data != nullptr) store_activations(worker, n, first, channels, a_data);
        if (grad_gradients_.data == nullptr) return;
        if (constant_) return store_constant(worker, n, first, channels);
        store_gradients(worker, n, first, channels, a_data);
    }

    void find_coefficients(const Worker& worker, int64_t n, int64_t t, int64_t first, int64_t channels,
                           const char* a_data) const {
        const char* g_data = gradients_.at(n, t, first);
        T* weights = worker.weights + t * channels;
        T* slopes = worker.slopes + t * channels;
        T* results = worker.results + t * channels;
        const T count = static_cast<T>(positions_);
        if (constant_)
            forward_->widen(g_data, gradients_.channel, channels, weights);
        else if (method_ == CamMethod::gradcam)
            forward_sum(worker, CamSum::plain, gradients_, g_data, gradients_, g_data, channels, weights);
        else if (method_ == CamMethod::xgradcam)
            forward_sum(worker, CamSum::product, activations_, a_data, gradients_, g_data, channels, weights);
        else
            forward_sum(worker, CamSum::plus_plus, gradients_, g_data, gradients_, g_data, channels, weights);
        const bool gated = method_ == CamMethod::elementwise;
        sum(worker, gated ? CamBackwardSum::gated : CamBackwardSum::product, activations_, a_data,
            grad_raw(n, t), weights, channels, slopes);
        if (!constant_ && method_ == CamMethod::gradcam_plus_plus)
            sum(worker, CamBackwardSum::squares, gradients_, g_data, nullptr, worker.activation_sums,
                channels, results);
        for (int64_t c = 0; c < channels; ++c) {
            const T total = worker.activation_sums[c], slope = slopes[c], g = weights[c];
            if (method_ == CamMethod::gradcam) {
                results[c] = slope;
                if (!constant_) {
                    weights[c] /= count;
                    slopes[c] /= count;
                }
            } else if (method_ == CamMethod::xgradcam) {
                const T divisor = total + static_cast<T>(1e-7), scaled = slope / divisor;
                weights[c] = (constant_ ? g * total : g) / divisor;
                worker.offsets[c] += scaled * ((constant_ ? g : T(0)) - weights[c]);
                slopes[c] = scaled;
                results[c] = scaled * total;
            } else if (method_ == CamMethod::gradcam_plus_plus) {
                if (!constant_) {
                    worker.offsets[c] -= slope * results[c];
                    continue;
                }
                const T eps = static_cast<T>(1e-6), positive = g < 0 ? T(0) : g, square = positive * positive;
                const T divisor = 2 * square + total * positive * square + eps,
                        value = positive * square / divisor;
                weights[c] = count * value;
                worker.offsets[c] -= slope * count * value * value;
                results[c] = slope * count * (square * (2 * square + 3 * eps) / divisor / divisor);
            } else if (method_ == CamMethod::layercam) {
                weights[c] = g < 0 ? T(0) : g;
                results[c] = g > 0 ? slope : T(0);
            } else {
                results[c] = slope;
            }
        }
    }

    // Whether results can be written as they are computed: rows as the tiles have them.
    bool has_tile_rows(const CamSource& layout) const { return planar_ ? layout.planar : layout.interleaved; }

    char* destination(const View& view, int64_t n, int64_t t, int64_t channel) const {
        const int64_t offset = n * view.image_stride + t * view.target_stride + channel * view.channel_stride;
        return static_cast<char*>(view.data) + offset * activations_.bytes;
    }

    void store_tile(const Worker& worker, const View& view, char* to, int64_t channels, int64_t s,
                    int64_t positions) const {
        kernels_->store_tile(worker.tile, planar_, channels, s, positions, to, view.channel_stride,
                             view.spatial_stride, shape_.extent.size);
    }

    void store_activations(const Worker& worker, int64_t n, int64_t first, int64_t channels,
                           const char* a_data) const {
        const bool by_weight =
            method_ == CamMethod::gradcam || method_ == CamMethod::gradcam_plus_plus || constant_;
        const bool needs_a = method_ == CamMethod::elementwise, needs_g = !by_weight;
        const CamTerm term = method_ == CamMethod::elementwise
                                 ? (constant_ ? CamTerm::weight_gated : CamTerm::both_gated)
                             : by_weight                      ? CamTerm::weight
                             : method_ == CamMethod::xgradcam ? CamTerm::weight_and_value
                             : method_ == CamMethod::hirescam ? CamTerm::product
                                                              : CamTerm::rectified;
        for_tiles(channels, false, [&](int64_t c, int64_t count, int64_t s, int64_t length) {
            CamTile a = {};
            a.planar = planar_;
            if (needs_a) a = tile_of(worker, 0, activations_, a_data, c, count, s, length);
            char* to = destination(grad_activations_, n, 0, first + c);
            const bool straight = shape_.targets == 1 && has_tile_rows(activations_out_);
            const int64_t stride = planar_ ? grad_activations_.channel_stride : activations_out_.position;
            if (shape_.targets == 0) std::fill(worker.tile, worker.tile + count * length, T(0));
            for (int64_t t = 0; t < shape_.targets; ++t) {
                const CamTile g =
                    needs_g ? tile_of(worker, 1, gradients_, gradients_.at(n, t, first), c, count, s, length)
                            : a;
                const int64_t at = t * channels + c;
                kernels_->terms(term, g, a, grad_raw(n, t) + s, worker.weights + at, worker.slopes + at,
                                worker.offsets + c, count, length, t > 0, straight,
                                straight ? to + s * (planar_ ? 1 : stride) * activations_.bytes
                                         : static_cast<void*>(worker.tile),
                                straight  ? stride
                                : planar_ ? length
                                          : count);
            }
            if (!straight) store_tile(worker, grad_activations_, to, count, s, length);
        });
    }

    void store_gradients(const Worker& worker, int64_t n, int64_t first, int64_t channels,
                         const char* a_data) const {
        const bool needs_a = method_ != CamMethod::gradcam && method_ != CamMethod::gradcam_plus_plus;
        const bool needs_g = method_ == CamMethod::gradcam_plus_plus || method_ == CamMethod::layercam ||
                             method_ == CamMethod::elementwise;
        const CamTerm term = method_ == CamMethod::gradcam             ? CamTerm::constant
                             : method_ == CamMethod::xgradcam          ? CamTerm::scaled
                             : method_ == CamMethod::gradcam_plus_plus ? CamTerm::plus_plus
                             : method_ == CamMethod::hirescam          ? CamTerm::product
                             : method_ == CamMethod::layercam          ? CamTerm::gated
                                                                       : CamTerm::both_gated;
        const bool straight = has_tile_rows(gradients_out_);
        const int64_t stride = planar_ ? grad_gradients_.channel_stride : gradients_out_.position;
        for_tiles(channels, false, [&](int64_t c, int64_t count, int64_t s, int64_t length) {
            CamTile a = {};
            a.planar = planar_;
            if (needs_a) a = tile_of(worker, 0, activations_, a_data, c, count, s, length);
            for (int64_t t = 0; t < shape_.targets; ++t) {
                const CamTile g =
                    needs_g ? tile_of(worker, 1, gradients_, gradients_.at(n, t, first), c, count, s, length)
                            : a;
                char* to = destination(grad_gradients_, n, t, first + c);
                kernels_->terms(term, needs_a ? a : g, g, grad_raw(n, t) + s,
                                worker.slopes + t * channels + c, worker.activation_sums + c, nullptr, count,
                                length, false, straight,
                                straight ? to + s * (planar_ ? 1 : stride) * activations_.bytes
                                         : static_cast<void*>(worker.tile),
                                straight  ? stride
                                : planar_ ? length
                                          : count);
                if (!straight) store_tile(worker, grad_gradients_, to, count, s, length);
            }
        });
    }

    void store_constant(const Worker& worker, int64_t n, int64_t first, int64_t channels) const {
        const View& view = grad_gradients_;
        const int64_t one[kSpatialRank] = {1, 1, 1}, none[kSpatialRank] = {0, 0, 0};
        for (int64_t t = 0; t < shape_.targets; ++t) {
            kernels_->store_tile(worker.results + t * channels, true, channels, 0, 1,
                                 destination(view, n, t, first), view.channel_stride, none, one);
        }
    }

    const CamShape shape_;
    const int64_t positions_;
    const CamMethod method_;
    const T* const grad_raw_;
    const View grad_activations_, grad_gradients_;
    const Parallel& parallel_;
    const CamSource activations_, gradients_;
    const CamSource activations_out_, gradients_out_;  // the layouts of the results
    const bool constant_;                              // gradients are given once for all positions
    const bool weighted_;                              // the map is a sum of weighted activations
    const bool planar_;                                // the layout of all tiles
    const CamKernels* forward_ = nullptr;
    const CamBackwardKernels* kernels_ = nullptr;
    int64_t block_ = 0;
};

template <typename T>
void run_backward(const CamShape& shape, const void* grad_raw, const ConstView& activations,
                  const ConstView& gradients, CamMethod method, const View& grad_activations,
                  const View& grad_gradients, const Parallel& parallel) {
    CamBackward<T>(shape, static_cast<const T*>(grad_raw), activations, gradients, method, grad_activations,
                   grad_gradients, parallel)
        .run();
}

}  // namespace

void cam_backward_cpu(const CamShape& shape, const void* grad_raw, const ConstView& activations,
                      const ConstView& gradients, CamMethod method, const View& grad_activations,
                      const View& grad_gradients, const Parallel& parallel) {
    if (shape.images == 0 || shape.channels == 0) return;
    const auto run = shape.type == ScalarType::float64 ? run_backward<double> : run_backward<float>;
    run(shape, grad_raw, activations, gradients, method, grad_activations, grad_gradients, parallel);
}

}  // namespace diffcam
