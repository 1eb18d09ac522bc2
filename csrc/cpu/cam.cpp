// cam_cpu: decides how the work is split, in what order the layouts are read, and which kernels read them.
//
// The split is a function of shapes and strides alone, and every task writes memory of its own: the number of
// threads changes who computes a sum, never its order.
#include "cpu/cam.h"

#include <algorithm>

#include "cpu/cam_source.h"
#include "diffcam/cpu_capability.h"

namespace diffcam {
namespace {

constexpr int64_t kTargetsAtOnce = 16;       // activations are read once for so many targets
constexpr int64_t kWeights = 4096;           // weights of a block of channels, all targets of a group
constexpr int64_t kTileElements = 16384;     // a copied tile: 64 KiB of float
constexpr int64_t kCacheBytes = 256 << 10;   // activations that are read twice stay in the second-level cache
constexpr int64_t kStreamedBytes = 4 << 20;  // less is likely to be in the caches already
constexpr int64_t kFetchedBytes = 512 << 10;  // so much is fetched into it before it is read
constexpr int64_t kFetchedRow = 768;          // bytes of the shortest plane for which that pays
constexpr int64_t kTaskBytes = 128 << 10;     // an image is not split into less
constexpr int64_t kTasks = 16;                // an image is split until there are so many tasks
constexpr int64_t kImagesPerWorker = 2;       // with so many, a task is an image

int64_t power_of_two_at_most(int64_t x) {
    int64_t power = 1;
    while (power * 2 <= x) power *= 2;
    return power;
}

template <typename T>
class Cam {
  public:
    Cam(const CamShape& shape, const ConstView& activations, const ConstView& gradients, CamMethod method,
        bool relu, Normalization normalize, double eps, T* maps, const Parallel& parallel)
        : shape_(shape),
          positions_(shape.extent.positions()),
          method_(method),
          relu_(relu),
          normalize_(normalize),
          eps_(eps),
          maps_(maps),
          parallel_(parallel),
          kernels_(kernels(shape.type)),
          activations_(cam_source(activations, shape)),
          gradients_(cam_source(gradients, shape)),
          constant_(shape.constant_gradients || same_at_every_position(gradients, shape.extent)),
          products_(!constant_ && (method == CamMethod::hirescam || method == CamMethod::layercam ||
                                   method == CamMethod::elementwise)),
          sums_activations_(method == CamMethod::xgradcam || method == CamMethod::gradcam_plus_plus) {
        choose_layouts();
        group_ = std::min(shape.targets, kTargetsAtOnce);
        groups_ = ceil_div(shape.targets, group_);
        const int64_t map_elements = shape.channels * positions_;
        image_bytes_ = map_elements * activations_.bytes * (1 + (constant_ ? 0 : group_));
        const int64_t bytes = image_bytes_ * shape.images * groups_;
        workers_ = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, bytes / kBytesPerThread));
        streams_ = method == CamMethod::gradcam && !constant_ && bytes >= kStreamedBytes;
        joins_ = !constant_ && shape.targets == 1 && activations_.planar && gradients_.planar &&
                 kernels_->joins(method, positions_);
    }

    void run() {
        const int64_t maps = shape_.images * shape_.targets;
        if (shape_.channels == 0) {
            std::fill(maps_, maps_ + maps * positions_, T(0));
            return finish_all(nullptr, 0);
        }
        // Tensors that are read together need one layout; otherwise the gradients may have planes.
        const bool rows_of_channels =
            !activations_.planar && activations_.interleaved &&
            (constant_ || (reads_together() ? !gradients_.planar && gradients_.interleaved
                                            : gradients_.planar || gradients_.interleaved));
        const int64_t tasks = shape_.images * groups_;
        int64_t parts = std::min(ceil_div(kTasks, tasks), image_bytes_ / kTaskBytes);
        parts = power_of_two_at_most(std::max<int64_t>(parts, 1));
        if (parts > 1 && rows_of_channels) {
            // Rows of at least 1 KiB are worth splitting; shorter ones are kept whole, and positions are
            // split.
            const bool split_channels = !products_ && shape_.channels / parts * activations_.bytes >= 1024;
            if (!split_channels) {
                parts = power_of_two_at_most(std::max<int64_t>(std::min(parts, positions_ / 32), 1));
                return run_positions(parts);
            }
        }
        // Each part has partial maps of its own: as many channels as make them cheap.
        const int64_t fewest = 32 * (constant_ ? group_ : 1);
        run_channels(power_of_two_at_most(std::max<int64_t>(std::min(parts, shape_.channels / fewest), 1)));
    }

  private:
    struct Worker {
        char* tiles[2];
    };

    static const CamKernels* kernels(ScalarType type) {
        const int index = static_cast<int>(type);
#if defined(__x86_64__)
        if (cpu_capability() == CpuCapability::avx512) return avx512::cam_kernels + index;
        if (cpu_capability() == CpuCapability::avx2) return avx2::cam_kernels + index;
#endif
        return standard::cam_kernels + index;
    }

    // One layout for each tensor; where both are possible (one channel, one position), the other tensor's.
    void choose_layouts() {
        CamSource& a = activations_;
        CamSource& g = gradients_;
        if (constant_) g.planar = g.interleaved = false;
        const bool planar = a.planar && (constant_ || g.planar),
                   interleaved = a.interleaved && (constant_ || g.interleaved);
        for (CamSource* source : {&a, &g}) {
            if (interleaved && (!planar || positions_ == 1))
                source->planar = false;
            else if (source->planar)
                source->interleaved = false;
        }
    }

    static CamTile tile_of(const CamSource& source, const char* data) {
        return {data, source.channel, source.position, source.planar};
    }

    // Calls body(x_tile, y_tile, first channel, channels, first position, positions) over a block of
    // channels: once where the layouts can be read as they are, tile by tile through copies otherwise.
    template <typename Body>
    void for_tiles(const Worker& worker, const CamSource& x, const char* x_data, const CamSource* y,
                   const char* y_data, int64_t channels, Body&& body) {
        const bool readable =
            (x.planar && (y == nullptr || y->planar)) || (x.interleaved && (y == nullptr || y->interleaved));
        const CamTile none = {};
        if (readable)
            return body(tile_of(x, x_data), y == nullptr ? none : tile_of(*y, y_data), 0, channels, 0,
                        positions_);
        const int64_t span = std::min<int64_t>(positions_, 256),
                      most = std::max<int64_t>(kTileElements / span, 1);
        const auto tile = [&](int buffer, const CamSource& source, const char* data, int64_t c, int64_t count,
                              int64_t s, int64_t length) -> CamTile {
            const char* start = data + c * source.channel * source.bytes;
            if (source.planar) return {start + s * source.bytes, source.channel, 1, true};
            kernels_->copy_tile(start, source.channel, source.spatial, shape_.extent.size, count, s, length,
                                worker.tiles[buffer]);
            return {worker.tiles[buffer], length, 1, true};
        };
        for (int64_t c = 0; c < channels; c += most) {
            const int64_t count = std::min(most, channels - c);
            for (int64_t s = 0; s < positions_; s += span) {
                const int64_t length = std::min(span, positions_ - s);
                body(tile(0, x, x_data, c, count, s, length),
                     y == nullptr ? none : tile(1, *y, y_data, c, count, s, length), c, count, s, length);
            }
        }
    }

    bool reads_together() const { return products_ || (!constant_ && method_ == CamMethod::xgradcam); }

    bool needs_tiles() const {
        const bool a = activations_.planar || activations_.interleaved;
        const bool g = constant_ || gradients_.planar || gradients_.interleaved;
        return !a || !g || (reads_together() && activations_.planar != gradients_.planar);
    }

    // Weights from sums. Constant gradients: sums holds the gradients.
    void finish_weights(T* sums, const T* activation_sums, int64_t channels) const {
        const T count = static_cast<T>(positions_);
        if (method_ == CamMethod::xgradcam) {
            for (int64_t c = 0; c < channels; ++c) {
                const T product = constant_ ? sums[c] * activation_sums[c] : sums[c];
                sums[c] = product / (activation_sums[c] + static_cast<T>(1e-7));
            }
        } else if (method_ == CamMethod::gradcam) {
            if (!constant_)
                for (int64_t c = 0; c < channels; ++c) sums[c] /= count;
        } else if (constant_ && method_ == CamMethod::gradcam_plus_plus) {
            for (int64_t c = 0; c < channels; ++c) {
                const T g = sums[c], square = g * g;
                const T alpha =
                    square / (2 * square + activation_sums[c] * g * square + static_cast<T>(1e-6));
                sums[c] = g == 0 ? T(0) : count * (alpha * (g < 0 ? T(0) : g));
            }
        } else if (constant_ && method_ == CamMethod::layercam) {
            for (int64_t c = 0; c < channels; ++c) sums[c] = sums[c] < 0 ? T(0) : sums[c];
        }
    }

    // Adds channels [first, first + channels) to the maps of targets [t0, t0 + targets) of image n.
    void add_block(const Worker& worker, int64_t n, int64_t t0, int64_t targets, int64_t first,
                   int64_t channels, bool accumulate, T* maps) {
        const CamSource& a = activations_;
        const CamSource& g = gradients_;
        const char* a_data = a.at(n, 0, first);
        if (products_) {
            for (int64_t t = 0; t < targets; ++t) {
                T* map = maps + t * positions_;
                for_tiles(worker, a, a_data, &g, g.at(n, t0 + t, first), channels,
                          [&](const CamTile& x, const CamTile& y, int64_t c, int64_t count, int64_t s,
                              int64_t length) {
                              kernels_->product_map(method_, x, y, count, length, accumulate || c > 0,
                                                    map + s);
                          });
            }
            return;
        }
        T weights[kWeights], activation_sums[kWeights];
        const auto sum = [&](CamSum kind, const CamSource& x, const char* x_data, const CamSource* y,
                             const char* y_data, T* sums) {
            for_tiles(
                worker, x, x_data, y, y_data, channels,
                [&](const CamTile& u, const CamTile& v, int64_t c, int64_t count, int64_t s, int64_t length) {
                    kernels_->channel_sums(
                        kind, u, v, kind == CamSum::plus_plus ? activation_sums + c : nullptr, count, length,
                        s > 0, sums + c, kind == CamSum::product ? activation_sums + c : nullptr);
                });
        };
        if (sums_activations_ && (constant_ || method_ == CamMethod::gradcam_plus_plus))
            sum(CamSum::plain, a, a_data, nullptr, nullptr, activation_sums);
        for (int64_t t = 0; t < targets; ++t) {
            T* w = weights + t * channels;
            const char* g_data = g.at(n, t0 + t, first);
            if (constant_)
                kernels_->widen(g_data, g.channel, channels, w);
            else if (method_ == CamMethod::xgradcam)
                sum(CamSum::product, a, a_data, &g, g_data, w);
            else if (method_ == CamMethod::gradcam)
                sum(CamSum::plain, g, g_data, t + 1 == targets && fetches(channels) ? &a : nullptr, a_data,
                    w);
            else
                sum(CamSum::plus_plus, g, g_data, nullptr, nullptr, w);
            finish_weights(w, activation_sums, channels);
        }
        for_tiles(worker, a, a_data, nullptr, nullptr, channels,
                  [&](const CamTile& x, const CamTile&, int64_t c, int64_t count, int64_t s, int64_t length) {
                      kernels_->weighted_maps(x, weights + c, channels, targets,
                                              method_ == CamMethod::elementwise, count, length,
                                              accumulate || c > 0, maps + s, positions_);
                  });
    }

    // Whether activations are fetched while gradients are summed: one pass alone, which waits for memory and
    // then for arithmetic, does not use all of the bandwidth.
    bool fetches(int64_t channels) const {
        const int64_t row = positions_ * activations_.bytes;
        if (!streams_ || channels * row > kFetchedBytes) return false;
        if (activations_.planar) return gradients_.planar && row >= kFetchedRow;
        return activations_.interleaved && !gradients_.planar && gradients_.interleaved &&
               channels * activations_.bytes >= kLongRow;
    }

    int64_t channels_at_once() const {
        const int64_t most = kWeights / group_;
        const bool twice = products_ ? group_ > 1 : sums_activations_ && !constant_;
        if (!twice || !activations_.planar) return most;
        const int64_t cached = kCacheBytes / (positions_ * activations_.bytes);
        return std::min(most, std::max<int64_t>(cached / 16 * 16, 16));
    }

    void finish(int64_t first, int64_t count, const T* parts, int64_t part_count) {
        const int64_t stride = shape_.images * shape_.targets * positions_;
        for (int64_t i = first; i < first + count; ++i)
            kernels_->finish(maps_ + i * positions_, parts + i * positions_, stride, part_count, positions_,
                             relu_, normalize_, eps_);
    }

    void finish_all(const T* parts, int64_t part_count) {
        const int64_t maps = shape_.images * shape_.targets;
        const int64_t bytes = maps * positions_ * (part_count + 2) * static_cast<int64_t>(sizeof(T));
        run_tasks(parallel_, std::min<int64_t>(parallel_.threads, bytes / kBytesPerThread), maps,
                  [&](int64_t, int64_t i) { finish(i, 1, parts, part_count); });
    }

    // Tasks are images, groups of targets and parts of the channels. The first part is summed in the result
    // itself.
    void run_channels(int64_t parts) {
        const int64_t map_count = shape_.images * shape_.targets;
        Scratch<T> partial((parts - 1) * map_count * positions_);
        const int64_t tile_bytes = needs_tiles() ? kTileElements * activations_.bytes : 0;
        Scratch<char> tiles(2 * tile_bytes * workers_);
        const int64_t at_once = channels_at_once();
        run_tasks(parallel_, workers_, shape_.images * parts * groups_, [&](int64_t index, int64_t task) {
            const Worker worker = {
                {tiles.get() + 2 * index * tile_bytes, tiles.get() + (2 * index + 1) * tile_bytes}};
            const int64_t group = task % groups_, part = task / groups_ % parts, n = task / groups_ / parts;
            const int64_t t0 = group * group_, targets = std::min(group_, shape_.targets - t0);
            const int64_t begin = boundary(part, parts), end = boundary(part + 1, parts);
            T* base = part == 0 ? maps_ : partial.get() + (part - 1) * map_count * positions_;
            T* maps = base + (n * shape_.targets + t0) * positions_;
            if (joins_) {
                kernels_->joint_map(method_, tile_of(activations_, activations_.at(n, 0, begin)),
                                    tile_of(gradients_, gradients_.at(n, t0, begin)), end - begin, positions_,
                                    maps);
            } else {
                for (int64_t c = begin; c < end; c += at_once)
                    add_block(worker, n, t0, targets, c, std::min(at_once, end - c), c > begin, maps);
            }
            if (parts == 1) finish(n * shape_.targets + t0, targets, nullptr, 0);
        });
        if (parts > 1) finish_all(partial.get(), parts - 1);
    }

    int64_t boundary(int64_t part, int64_t parts) const {
        return part == parts ? shape_.channels : shape_.channels * part / parts / 16 * 16;
    }

    // Channels are next to each other and few. Sums over positions are made in parts, added up, and then
    // every part of a map is complete in itself. Where images are many, a task is an image, and what is read
    // twice comes from a cache the second time. Otherwise tasks are parts, of all images, one step after the
    // other.
    void run_positions(int64_t parts) {
        const auto run_part = [&](int64_t n, int64_t group, int64_t part, auto&& body) {
            const int64_t t0 = group * group_, begin = positions_ * part / parts;
            body(n, t0, std::min(t0 + group_, shape_.targets), part, begin,
                 positions_ * (part + 1) / parts - begin);
        };
        const auto in_parallel = [&](auto&& body) {
            run_tasks(parallel_, workers_, shape_.images * parts * groups_, [&](int64_t, int64_t task) {
                run_part(task / groups_ / parts, task % groups_, task / groups_ % parts, body);
            });
        };
        if (products_) {
            in_parallel([&](int64_t n, int64_t t0, int64_t t1, int64_t, int64_t s, int64_t length) {
                for (int64_t t = t0; t < t1; ++t)
                    kernels_->product_map(method_, part_of(activations_, n, 0, s),
                                          part_of(gradients_, n, t, s), shape_.channels, length, false,
                                          maps_ + (n * shape_.targets + t) * positions_ + s);
            });
            return finish_all(nullptr, 0);
        }
        Scratch<T> weights(shape_.images * shape_.targets * parts * shape_.channels);
        Scratch<T> activation_sums(sums_activations_ ? shape_.images * parts * shape_.channels : 0);
        const PartSums sums = {weights.get(), activation_sums.get(), parts};
        if (shape_.images >= kImagesPerWorker * workers_) {
            run_tasks(parallel_, workers_, shape_.images, [&](int64_t, int64_t n) {
                add_positions(sums, n, n + 1, [&](auto&& body) {
                    for (int64_t part = 0; part < parts; ++part)
                        for (int64_t group = 0; group < groups_; ++group) run_part(n, group, part, body);
                });
            });
        } else {
            add_positions(sums, 0, shape_.images, in_parallel);
        }
        finish_all(nullptr, 0);
    }

    // Sums of parts of the positions: of image n, part p and channel c at (n * parts + p) * channels + c, and
    // likewise for each target of an image.
    struct PartSums {
        T *weights, *activation_sums;
        int64_t parts;
    };

    // The maps of images [first, last). for_parts calls its argument for each of their groups and parts.
    template <typename ForParts>
    void add_positions(const PartSums& sums, int64_t first, int64_t last, ForParts&& for_parts) {
        const int64_t channels = shape_.channels, parts = sums.parts;
        const auto activation_sum = [&](int64_t n, int64_t part) {
            return sums.activation_sums + (n * parts + part) * channels;
        };
        const auto weight = [&](int64_t n, int64_t t, int64_t part) {
            return sums.weights + ((n * shape_.targets + t) * parts + part) * channels;
        };
        const auto add_parts = [&](T* totals) {
            for (int64_t part = 1; part < parts; ++part)
                for (int64_t c = 0; c < channels; ++c) totals[c] += totals[part * channels + c];
        };
        if (sums_activations_ && (constant_ || method_ == CamMethod::gradcam_plus_plus)) {
            for_parts([&](int64_t n, int64_t t0, int64_t, int64_t part, int64_t s, int64_t length) {
                if (t0 > 0) return;
                const CamTile a = part_of(activations_, n, 0, s);
                kernels_->channel_sums(CamSum::plain, a, a, nullptr, channels, length, false,
                                       activation_sum(n, part), nullptr);
            });
            for (int64_t n = first; n < last; ++n) add_parts(activation_sum(n, 0));
        }
        if (!constant_) {
            const CamSum kind = method_ == CamMethod::xgradcam  ? CamSum::product
                                : method_ == CamMethod::gradcam ? CamSum::plain
                                                                : CamSum::plus_plus;
            for_parts([&](int64_t n, int64_t t0, int64_t t1, int64_t part, int64_t s, int64_t length) {
                for (int64_t t = t0; t < t1; ++t) {
                    T* plain = t == 0 ? activation_sum(n, part) : nullptr;
                    const CamTile g = part_of(gradients_, n, t, s);
                    const CamTile x = kind == CamSum::product ? part_of(activations_, n, 0, s) : g;
                    kernels_->channel_sums(kind, x, g, activation_sum(n, 0), channels, length, false,
                                           weight(n, t, part), plain);
                }
            });
            if (kind == CamSum::product)
                for (int64_t n = first; n < last; ++n) add_parts(activation_sum(n, 0));
        }
        for (int64_t n = first; n < last; ++n) {
            for (int64_t t = 0; t < shape_.targets; ++t) {
                T* w = weight(n, t, 0);
                if (constant_)
                    kernels_->widen(gradients_.at(n, t, 0), gradients_.channel, channels, w);
                else
                    add_parts(w);
                finish_weights(w, activation_sum(n, 0), channels);
            }
        }
        for_parts([&](int64_t n, int64_t t0, int64_t t1, int64_t, int64_t s, int64_t length) {
            kernels_->weighted_maps(part_of(activations_, n, 0, s), weight(n, t0, 0), parts * channels,
                                    t1 - t0, method_ == CamMethod::elementwise, channels, length, false,
                                    maps_ + (n * shape_.targets + t0) * positions_ + s, positions_);
        });
    }

    CamTile part_of(const CamSource& source, int64_t n, int64_t t, int64_t s) const {
        return tile_of(source, source.at(n, t, 0) + s * source.position * source.bytes);
    }

    const CamShape shape_;
    const int64_t positions_;
    const CamMethod method_;
    const bool relu_;
    const Normalization normalize_;
    const double eps_;
    T* const maps_;
    const Parallel& parallel_;
    const CamKernels* const kernels_;
    CamSource activations_, gradients_;
    const bool constant_;  // gradients are the same at every position
    const bool products_;  // the map is a sum of products: no weights
    const bool sums_activations_;
    bool streams_ = false;            // two passes of gradcam, and inputs that come from memory
    bool joins_ = false;              // one kernel makes a map from gradients
    int64_t group_ = 1, groups_ = 1;  // targets are taken in groups
    int64_t image_bytes_ = 0, workers_ = 1;
};

}  // namespace

void cam_cpu(const CamShape& shape, const ConstView& activations, const ConstView& gradients,
             CamMethod method, bool relu, Normalization normalize, double eps, void* maps,
             const Parallel& parallel) {
    if (shape.images == 0 || shape.targets == 0 || shape.extent.positions() == 0) return;
    if (shape.type == ScalarType::float64)
        Cam<double>(shape, activations, gradients, method, relu, normalize, eps, static_cast<double*>(maps),
                    parallel)
            .run();
    else
        Cam<float>(shape, activations, gradients, method, relu, normalize, eps, static_cast<float*>(maps),
                   parallel)
            .run();
}

}  // namespace diffcam
