// overlay on a GPU: one launch draws. Where maps are normalised, a launch before it finds what they span, and
// where pictures are divided by their largest value, one more finds that; nothing resized is ever stored.
#include "diffcam/overlay.h"
#include "elements.h"

namespace diffcam {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // of a multiprocessor, at the least: more would leave too few registers
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 4;            // pixels that a thread draws at once: three words of a picture
constexpr int kPartPixels = 4096;    // pixels of a block, more where there would be too many parts
constexpr int64_t kMostParts = 512;  // of a map
constexpr int64_t kMostGrid = 0x7fffffff;

// Colours are packed in quarters of 1/255, ten bits each, as on the CPU: exact for tables of bytes.
constexpr int kColorBytes = kOverlayColors * 4;
constexpr int kSharedBytes = kColorBytes + kWarps * 16;
constexpr unsigned kInvalidPixel = 0xff00ff;  // magenta

// How the pixels of an image are read.
enum class Access : int {
    single,      // one by one, with any strides
    planar,      // groups from three planes
    interleaved  // groups of red, green, blue, red, ...
};

struct Task {
    OverlayShape shape;
    ConstView maps, images;
    OverlayOptions options;
    const float* table;
    uint8_t* pictures;
    void* ranges;      // low and high of each part of each map
    float* brightest;  // of each part of each picture
    int parts, part_pixels, pixels;
    int64_t items;  // parts of all maps
    Access access;
};

// Maps
// ------------------------------------------------------------------------------------------------------------

// NaN wins, as in torch.amin and torch.amax.
template <typename T>
struct Range {
    T low = static_cast<T>(INFINITY), high = static_cast<T>(-INFINITY);

    __device__ __forceinline__ void add(T other_low, T other_high) {
        low = low < other_low || low != low ? low : other_low;
        high = high > other_high || high != high ? high : other_high;
    }
};

template <typename T>
__device__ __forceinline__ Range<T> block_range(Range<T> seen, unsigned char* memory) {
    for (int distance = 16; distance > 0; distance /= 2)
        seen.add(__shfl_xor_sync(~0u, seen.low, distance), __shfl_xor_sync(~0u, seen.high, distance));
    T* warps = reinterpret_cast<T*>(memory);
    __syncthreads();  // the memory is free
    if (threadIdx.x % 32 == 0) {
        warps[2 * (threadIdx.x / 32)] = seen.low;
        warps[2 * (threadIdx.x / 32) + 1] = seen.high;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) seen.add(warps[2 * warp], warps[2 * warp + 1]);
    return seen;
}

// Where a pixel lies between two positions of the map: corners not aligned, edges repeated.
template <typename T>
struct Place {
    int first, second;
    T weight;  // of the second

    __device__ __forceinline__ Place(int pixel, int64_t positions, int64_t pixels) {
        const T scale = static_cast<T>(positions) / static_cast<T>(pixels);
        T at = scale * (static_cast<T>(pixel) + T(0.5)) - T(0.5);
        if (at < 0) at = 0;
        const int last = static_cast<int>(positions) - 1;
        first = min(static_cast<int>(at), last);
        second = min(first + 1, last);
        weight = at - static_cast<T>(first);
    }
};

// A constant map stays constant to the last bit: its normalisation must not magnify rounding.
template <typename T>
__device__ __forceinline__ T between(T a, T b, T weight) {
    return a + (b - a) * weight;
}

template <typename E>
struct Map {
    using T = Accumulator<E>;
    const E* data;
    int64_t row_stride, column_stride, height, width, pixel_height, pixel_width;

    __device__ __forceinline__ Map(const Task& task, int64_t index)
        : data(static_cast<const E*>(task.maps.data) + index / task.shape.targets * task.maps.image_stride +
               index % task.shape.targets * task.maps.target_stride),
          row_stride(task.maps.spatial_stride[1]),
          column_stride(task.maps.spatial_stride[2]),
          height(task.shape.map_height),
          width(task.shape.map_width),
          pixel_height(task.shape.height),
          pixel_width(task.shape.width) {}

    __device__ __forceinline__ T at(int y, int x) const {
        return widen(data[y * row_stride + x * column_stride]);
    }

    // At pixel (y, x).
    __device__ __forceinline__ T resized(int y, int x) const {
        if (height == pixel_height && width == pixel_width) return at(y, x);
        const Place<T> row(y, height, pixel_height), column(x, width, pixel_width);
        const T above = between(at(row.first, column.first), at(row.first, column.second), column.weight);
        const T below = between(at(row.second, column.first), at(row.second, column.second), column.weight);
        return between(above, below, row.weight);
    }
};

// From values to levels: (value - offset) * factor.
template <typename T>
struct Scale {
    T offset = 0, factor = 1;

    // Called by all threads of a block, which share what they find of the map's parts.
    __device__ __forceinline__ Scale(const Task& task, int64_t index, unsigned char* memory) {
        if (task.options.normalize == Normalization::none) return;
        const T* parts = static_cast<const T*>(task.ranges) + 2 * index * task.parts;
        Range<T> range;
        for (int part = threadIdx.x; part < task.parts; part += kThreads)
            range.add(parts[2 * part], parts[2 * part + 1]);
        range = block_range(range, memory);
        if (task.options.normalize == Normalization::minmax) offset = range.low;
        factor = 1 / (range.high - offset + static_cast<T>(task.options.eps));
    }
};

// Images
// ------------------------------------------------------------------------------------------------------------

// From 0 to 255; NaN is black.
__device__ __forceinline__ float pixel_value(uint8_t x) { return static_cast<float>(x); }
template <typename P>
__device__ __forceinline__ float pixel_value(P element) {
    const float x = static_cast<float>(widen(element));
    return x > 0 ? fminf(x, 1.0f) * 255.0f : 0.0f;
}

// The group of pixels from `pixel` on, `count` of them, as channels of each.
template <typename P>
__device__ __forceinline__ void load_group(const Task& task, int64_t image, int pixel, int count,
                                           float (*pixels)[3]) {
    const P* data = static_cast<const P*>(task.images.data) + image * task.images.image_stride;
    if (task.access != Access::single && count == kGroup) {
        const bool planar = task.access == Access::planar;
        for (int pack = 0; pack < 3; ++pack) {
            const int64_t at =
                planar ? pack * task.images.channel_stride + pixel : int64_t{3} * pixel + pack * kGroup;
            const Pack<P, kGroup> elements = *reinterpret_cast<const Pack<P, kGroup>*>(data + at);
            for (int i = 0; i < kGroup; ++i) {
                const float value = pixel_value(elements.element[i]);
                const int flat = pack * kGroup + i;  // among interleaved ones
                if (planar)
                    pixels[i][pack] = value;
                else
                    pixels[flat / 3][flat % 3] = value;
            }
        }
        return;
    }
    const int width = static_cast<int>(task.shape.width);
    for (int i = 0; i < kGroup; ++i) {
        if (i >= count) break;
        const int y = (pixel + i) / width, x = (pixel + i) % width;
        const P* element = data + y * task.images.spatial_stride[1] + x * task.images.spatial_stride[2];
        for (int channel = 0; channel < 3; ++channel)
            pixels[i][channel] = pixel_value(element[channel * task.images.channel_stride]);
    }
}

__device__ __forceinline__ void load_group(const Task& task, int64_t image, int pixel, int count,
                                           float (*pixels)[3]) {
    switch (task.shape.pixel_type) {
        case PixelType::float32:
            return load_group<float>(task, image, pixel, count, pixels);
        case PixelType::float64:
            return load_group<double>(task, image, pixel, count, pixels);
        case PixelType::bfloat16:
            return load_group<__nv_bfloat16>(task, image, pixel, count, pixels);
        case PixelType::float16:
            return load_group<__half>(task, image, pixel, count, pixels);
        case PixelType::uint8:
            return load_group<uint8_t>(task, image, pixel, count, pixels);
    }
}

// Mixtures
// ------------------------------------------------------------------------------------------------------------

// The table in shared memory, packed; ready after a barrier.
__device__ __forceinline__ void pack_colors(const float* table, unsigned* colors) {
    constexpr float kQuarters = 4 * 255;
    for (int i = threadIdx.x; i < kOverlayColors; i += kThreads) {
        unsigned packed = 0;
        for (int channel = 0; channel < 3; ++channel) {
            const float quarters = table[3 * i + channel] * kQuarters + 0.5f;
            const float bounded = quarters > 0 ? fminf(quarters, kQuarters + 0.5f) : 0.0f;  // NaN too
            packed |= static_cast<unsigned>(bounded) << 10 * channel;
        }
        colors[i] = packed;
    }
}

__device__ __forceinline__ float channel_of(unsigned packed, int channel) {
    return static_cast<float>(packed >> 10 * channel & 1023) * 0.25f;
}

// Calls body(pixel, count, levels, colours, whether each is NaN, pixels) for the groups of an item that are
// the thread's.
template <typename E, typename Body>
__device__ __forceinline__ void for_groups(const Task& task, int64_t item, const unsigned* colors,
                                           unsigned char* memory, Body body) {
    using T = Accumulator<E>;
    const int64_t index = item / task.parts;
    const Map<E> map(task, index);
    const Scale<T> scale(task, index, memory);
    const int width = static_cast<int>(task.shape.width);
    const int begin = static_cast<int>(item % task.parts) * task.part_pixels;
    const int end = min(task.pixels - begin, task.part_pixels) + begin;
    const bool rounds = task.options.blend == Blend::proportional;
    for (int pixel = begin + kGroup * threadIdx.x; pixel < end; pixel += kGroup * kThreads) {
        const int count = min(kGroup, end - pixel);
        float levels[kGroup], pixels[kGroup][3];
        unsigned packed[kGroup];
        bool invalid[kGroup];
        load_group(task, index / task.shape.targets, pixel, count, pixels);
        int y = pixel / width, x = pixel % width;
        for (int i = 0; i < kGroup; ++i) {
            if (i >= count) break;
            const float level = static_cast<float>((map.resized(y, x) - scale.offset) * scale.factor);
            invalid[i] = level != level;
            levels[i] = level > 0 ? fminf(level, 1.0f) : 0.0f;
            packed[i] = colors[static_cast<int>(levels[i] * (kOverlayColors - 1) + (rounds ? 0.5f : 0.0f))];
            if (++x == width) {
                x = 0;
                ++y;
            }
        }
        body(pixel, count, levels, packed, invalid, pixels);
    }
}

// Kernels
// ------------------------------------------------------------------------------------------------------------

template <typename E>
__global__ void __launch_bounds__(kThreads) overlay_ranges(Task task) {
    using T = Accumulator<E>;
    for (int64_t item = blockIdx.x; item < task.items; item += gridDim.x) {
        const Map<E> map(task, item / task.parts);
        const int width = static_cast<int>(task.shape.width);
        const int begin = static_cast<int>(item % task.parts) * task.part_pixels;
        const int end = min(task.pixels - begin, task.part_pixels) + begin;
        Range<T> range;
        for (int pixel = begin + threadIdx.x; pixel < end; pixel += kThreads) {
            const T value = map.resized(pixel / width, pixel % width);
            range.add(value, value);
        }
        range = block_range(range, dynamic_shared() + kColorBytes);
        if (threadIdx.x == 0) {
            T* out = static_cast<T*>(task.ranges) + 2 * item;
            out[0] = range.low;
            out[1] = range.high;
        }
    }
}

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocks) overlay_brightest(Task task) {
    unsigned* colors = reinterpret_cast<unsigned*>(dynamic_shared());
    unsigned char* memory = dynamic_shared() + kColorBytes;
    pack_colors(task.table, colors);
    __syncthreads();
    const float opacity = task.options.opacity, rest = 1 - opacity;
    for (int64_t item = blockIdx.x; item < task.items; item += gridDim.x) {
        Range<float> found;
        for_groups<E>(task, item, colors, memory,
                      [&](int, int count, const float*, const unsigned* packed, const bool* invalid,
                          const float (*pixels)[3]) {
                          for (int i = 0; i < kGroup; ++i) {
                              if (i >= count) break;
                              for (int channel = 0; channel < 3; ++channel) {
                                  const float mixed = fmaf(channel_of(packed[i], channel), opacity,
                                                           pixels[i][channel] * rest);
                                  if (!invalid[i]) found.add(mixed, mixed);
                              }
                          }
                      });
        found = block_range(found, memory);
        if (threadIdx.x == 0) task.brightest[item] = found.high;
    }
}

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocks) overlay_draw(Task task) {
    unsigned* colors = reinterpret_cast<unsigned*>(dynamic_shared());
    unsigned char* memory = dynamic_shared() + kColorBytes;
    pack_colors(task.table, colors);
    __syncthreads();
    const float opacity = task.options.opacity, rest = 1 - opacity;
    const bool uniform = task.options.blend == Blend::uniform, words = task.pixels % kGroup == 0;
    for (int64_t item = blockIdx.x; item < task.items; item += gridDim.x) {
        float divisor = 1;
        if (uniform) {
            Range<float> found;
            const float* parts = task.brightest + item / task.parts * task.parts;
            for (int part = threadIdx.x; part < task.parts; part += kThreads)
                found.add(parts[part], parts[part]);
            found = block_range(found, memory);
            divisor = found.high > 0 ? found.high : 1.0f;
        }
        uint8_t* picture = task.pictures + item / task.parts * task.pixels * 3;
        for_groups<E>(
            task, item, colors, memory,
            [&](int pixel, int count, const float* levels, const unsigned* packed, const bool* invalid,
                const float (*pixels)[3]) {
                unsigned drawn[kGroup];
                for (int i = 0; i < kGroup; ++i) {
                    if (i >= count) break;
                    drawn[i] = 0;
                    for (int channel = 0; channel < 3; ++channel) {
                        const float color = channel_of(packed[i], channel), under = pixels[i][channel];
                        const float mixed = uniform ? fmaf(color, opacity, under * rest) / divisor * 255.0f
                                                    : fmaf(opacity * levels[i], color - under, under) + 0.5f;
                        drawn[i] |= static_cast<unsigned>(mixed) << 8 * channel;
                    }
                    if (invalid[i]) drawn[i] = kInvalidPixel;
                }
                uint8_t* out = picture + int64_t{3} * pixel;
                if (words) {
                    Pack<unsigned, 1>* to = reinterpret_cast<Pack<unsigned, 1>*>(out);
                    to[0].element[0] = drawn[0] | drawn[1] << 24;
                    to[1].element[0] = drawn[1] >> 8 | drawn[2] << 16;
                    to[2].element[0] = drawn[2] >> 16 | drawn[3] << 8;
                    return;
                }
                for (int i = 0; i < kGroup; ++i) {
                    if (i >= count) break;
                    for (int channel = 0; channel < 3; ++channel)
                        out[3 * i + channel] = static_cast<uint8_t>(drawn[i] >> 8 * channel);
                }
            });
    }
}

// Launching
// ------------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t part_pixels(const OverlayShape& shape) {
    const int64_t least = ceil_div(shape.height * shape.width, kMostParts);
    return kPartPixels * ceil_div(least, kPartPixels);
}

int64_t part_count(const OverlayShape& shape) {
    return ceil_div(shape.height * shape.width, part_pixels(shape));
}

int64_t ranges_bytes(const OverlayShape& shape, const OverlayOptions& options) {
    if (options.normalize == Normalization::none) return 0;
    return shape.images * shape.targets * part_count(shape) * 16;
}

int64_t element_bytes(PixelType type) {
    return type == PixelType::uint8 ? 1 : scalar_bytes(static_cast<ScalarType>(type));
}

Access access_to(const OverlayShape& shape, const ConstView& images) {
    const int64_t row = images.spatial_stride[1], column = images.spatial_stride[2];
    const int64_t group_bytes = kGroup * element_bytes(shape.pixel_type);
    const bool aligned =
        reinterpret_cast<uintptr_t>(images.data) % static_cast<uintptr_t>(group_bytes) == 0 &&
        images.image_stride % kGroup == 0;
    if (!aligned || row != shape.width * column) return Access::single;
    if (column == 1 && images.channel_stride % kGroup == 0) return Access::planar;
    if (column == 3 && images.channel_stride == 1) return Access::interleaved;
    return Access::single;
}

}  // namespace

int64_t overlay_cuda_scratch_bytes(const OverlayShape& shape, const OverlayOptions& options,
                                   const CudaQueue&) {
    if (shape.images * shape.targets * shape.height * shape.width == 0) return 0;
    const int64_t brightest =
        options.blend == Blend::uniform ? shape.images * shape.targets * part_count(shape) * 4 : 0;
    return ranges_bytes(shape, options) + brightest;
}

int overlay_cuda(const OverlayShape& shape, const ConstView& maps, const ConstView& images,
                 const float* table, const OverlayOptions& options, uint8_t* pictures, void* scratch,
                 const CudaQueue& queue) {
    const int64_t pixels = shape.height * shape.width, count = shape.images * shape.targets;
    if (count * pixels == 0) return cudaSuccess;
    // Pixels, and with them a part's end, are counted in int.
    if (pixels > (int64_t{1} << 30) || shape.map_height * shape.map_width > (int64_t{1} << 30))
        return cudaErrorInvalidValue;
    Task task{};
    task.shape = shape;
    task.maps = maps;
    task.images = images;
    task.options = options;
    task.table = table;
    task.pictures = pictures;
    task.ranges = scratch;
    task.brightest =
        reinterpret_cast<float*>(static_cast<unsigned char*>(scratch) + ranges_bytes(shape, options));
    task.pixels = static_cast<int>(pixels);
    task.part_pixels = static_cast<int>(part_pixels(shape));
    task.parts = static_cast<int>(part_count(shape));
    task.items = count * task.parts;
    task.access = access_to(shape, images);
    const dim3 grid(static_cast<unsigned>(task.items < kMostGrid ? task.items : kMostGrid)), block(kThreads);
    return with_element_type(shape.map_type, [&](auto element) {
        using E = decltype(element);
        const auto queue_up = [&](void (*kernel)(Task)) {
            return launch(kernel, grid, block, kSharedBytes, 1, queue.stream, task);
        };
        int error = cudaSuccess;
        if (options.normalize != Normalization::none) error = queue_up(overlay_ranges<E>);
        if (error == cudaSuccess && options.blend == Blend::uniform) error = queue_up(overlay_brightest<E>);
        return error == cudaSuccess ? queue_up(overlay_draw<E>) : error;
    });
}

}  // namespace diffcam
