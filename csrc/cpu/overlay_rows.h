// A thread's memory in overlay, and the rows of a map at the size of its image.
#pragma once

#include "cpu/overlay.h"
#include "cpu/simd.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = Vec<float>::kLanes;

DIFFCAM_INLINE Ints truncated(Vec<float> x) { return __builtin_convertvector(x.raw, Ints); }
DIFFCAM_INLINE Vec<float> as_float(Ints x) {
    return {(RawFloat) __builtin_convertvector(x, decltype(zero<float>().raw))};
}
DIFFCAM_INLINE Ints is_nan(Vec<float> x) { return (Ints)(x.raw != x.raw); }
template <typename I>
DIFFCAM_INLINE Ints load_ints(const I* p) {
    Ints x;
    __builtin_memcpy(&x, p, kVectorBytes);
    return x;
}
DIFFCAM_INLINE void store_ints(uint32_t* p, Ints x) { __builtin_memcpy(p, &x, kVectorBytes); }

// The lowest byte of each.
DIFFCAM_INLINE void store_bytes(uint8_t* p, Ints x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
    const __m256i bytes = (__m256i)x;
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

template <typename T>
DIFFCAM_INLINE T least(T a, T b) {
    return b < a ? b : a;
}

// Memory
// ------------------------------------------------------------------------------------------------------

// Rows are as long as whole vectors, so that loops over them have no remainders. What lies behind a row's end
// repeats its last element in a map, and is zero in an image: neither changes what is largest or smallest.
constexpr int64_t kPadding = kOverlayAlignment / sizeof(float);

DIFFCAM_INLINE int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

struct Scratch {
    int64_t map_width, width;  // padded
    double* memory;

    Scratch(const OverlayShape& shape, void* data)
        : map_width(padded(shape.map_width)),
          width(padded(shape.width)),
          memory(static_cast<double*>(data)) {}

    int64_t bytes() const {
        return static_cast<int64_t>(sizeof(double)) * (map_width + 4 * width) + kRows * 4 * width;
    }

    // As accumulators of the map's type.
    template <typename T>
    T* source() const {  // a row of the map as it is
        return reinterpret_cast<T*>(memory);
    }
    template <typename T>
    T* row(int64_t i) const {  // a row of the map at the image's width; even and odd ones take turns
        return reinterpret_cast<T*>(memory + map_width + (i & 1) * width);
    }
    template <typename T>
    T* values() const {  // a row of the resized map
        return reinterpret_cast<T*>(memory + map_width + 2 * width);
    }
    template <typename T>
    T* weight() const {  // of the second column
        return reinterpret_cast<T*>(memory + map_width + 3 * width);
    }

    float* floats() const { return reinterpret_cast<float*>(memory + map_width + 4 * width); }
    int32_t* first() const { return reinterpret_cast<int32_t*>(floats()); }  // columns of the map
    int32_t* second() const { return first() + width; }
    float* level() const { return floats() + 2 * width; }
    uint32_t* colors() const { return reinterpret_cast<uint32_t*>(floats() + 3 * width); }
    uint8_t* indices() const { return reinterpret_cast<uint8_t*>(floats() + 4 * width); }
    float* pixels(int channel) const { return floats() + (5 + channel) * width; }
    static constexpr int64_t kRows = 8;
    // Mixtures of row y, for which there is room only where the call keeps them.
    float* kept(int64_t y) const { return floats() + (kRows + 3 * y) * width; }
};

// Resizing
// ----------------------------------------------------------------------------------------------------

// Where a pixel lies between two positions of the map: corners not aligned, edges repeated.
template <typename T>
struct Place {
    int64_t first, second;
    T weight;  // of the second

    DIFFCAM_INLINE Place(int64_t pixel, int64_t positions, int64_t pixels) {
        const T scale = static_cast<T>(positions) / static_cast<T>(pixels);
        T at = scale * (static_cast<T>(pixel) + T(0.5)) - T(0.5);
        if (at < 0) at = 0;
        first = least(static_cast<int64_t>(at), positions - 1);
        second = least(first + 1, positions - 1);
        weight = at - static_cast<T>(first);
    }
};

// A row of any type and stride as accumulators.
template <typename E>
void widen(const E* row, int64_t stride, int64_t count, Accumulator<E>* out) {
    constexpr int kStep = Vec<Accumulator<E>>::kLanes;
    int64_t i = 0;
    if (stride == 1)
        for (; i + kStep <= count; i += kStep) store(out + i, load(row + i));
    for (; i < count; ++i) out[i] = to_accumulator(row[i * stride]);
}

// A constant map stays constant to the last bit: its normalisation must not magnify rounding.
template <typename T>
DIFFCAM_INLINE void mix_rows(const T* a, const T* b, T weight, int64_t count, T* out) {
    const Vec<T> second = broadcast(weight);
    for (int64_t i = 0; i < count; i += Vec<T>::kLanes) {
        const Vec<T> start = load(a + i);
        store(out + i, fma(load(b + i) - start, second, start));
    }
}

// The rows of one map at the image's size, from one to the next.
template <typename E>
class ResizedRows {
  public:
    using T = Accumulator<E>;

    ResizedRows(const OverlayCall& call, int64_t index, const Scratch scratch)
        : shape_(call.shape),
          row_stride_(call.maps.spatial_stride[1]),
          column_stride_(call.maps.spatial_stride[2]),
          scratch_(scratch) {
        const int64_t image = index / shape_.targets, target = index % shape_.targets;
        map_ = static_cast<const E*>(call.maps.data) + image * call.maps.image_stride +
               target * call.maps.target_stride;
        same_ = shape_.map_height == shape_.height && shape_.map_width == shape_.width;
    }

    // Row y, padded.
    const T* at(int64_t y) {
        T* values = scratch_.values<T>();
        if (same_) {
            widen(map_ + y * row_stride_, column_stride_, shape_.width, values);
            for (int64_t x = shape_.width; x < scratch_.width; ++x) values[x] = values[shape_.width - 1];
            return values;
        }
        const Place<T> place(y, shape_.map_height, shape_.height);
        const T* first = row(place.first);
        mix_rows(first, row(place.second), place.weight, scratch_.width, values);
        return values;
    }

  private:
    // Row i of the map, resized to the image's width.
    const T* row(int64_t i) {
        T* out = scratch_.row<T>(i);
        if (held_[i & 1] == i) return out;
        held_[i & 1] = i;
        T* source = scratch_.source<T>();
        widen(map_ + i * row_stride_, column_stride_, shape_.map_width, source);
        const int32_t *first = scratch_.first(), *second = scratch_.second();
        const T* weight = scratch_.weight<T>();
        for (int64_t x = 0; x < scratch_.width; ++x) {
            const T start = source[first[x]];
            out[x] = start + (source[second[x]] - start) * weight[x];
        }
        return out;
    }

    const OverlayShape& shape_;
    const E* map_;
    int64_t row_stride_, column_stride_;
    Scratch scratch_;
    bool same_;
    int64_t held_[2] = {-1, -1};
};

template <typename T>
void prepare_columns(const OverlayShape& shape, const Scratch scratch) {
    for (int64_t x = 0; x < scratch.width; ++x) {
        const Place<T> place(least(x, shape.width - 1), shape.map_width, shape.width);
        scratch.first()[x] = static_cast<int32_t>(place.first);
        scratch.second()[x] = static_cast<int32_t>(place.second);
        scratch.weight<T>()[x] = place.weight;
    }
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
