// Rows of images of any type and layout, as three rows of floats.
#pragma once

#include "cpu/overlay_rows.h"

namespace diffcam {
namespace DIFFCAM_CAPABILITY {
namespace {

// Pixels from 0 to 255; NaN is black.
DIFFCAM_INLINE float pixel(uint8_t x) { return x; }
template <typename P>
DIFFCAM_INLINE float pixel(P element) {
    float x = static_cast<float>(to_accumulator(element));
    x = x > 0 ? x : 0;
    return (x < 1 ? x : 1) * 255;
}

#if defined(__AVX2__)
// The same for a vector of them.
template <typename P>
DIFFCAM_INLINE Vec<float> pixel_vector(const P* p) {
    return minimum(maximum(load(p), zero<float>()), broadcast(1.0f)) * broadcast(255.0f);
}
DIFFCAM_INLINE Vec<float> pixel_vector(const uint8_t* p) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#else
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#endif
}

// What lane i of a channel is among three vectors of red, green, blue, red, ...: element 3 i + channel. Lanes
// and three have no common factor, so no two lanes take elements from the same place of different vectors.
struct Third {
    int32_t place[kLanes];
    int32_t from[3][kLanes];  // all bits where the place's element is taken from that vector

    constexpr explicit Third(int channel) : place(), from() {
        for (int i = 0; i < kLanes; ++i) {
            const int element = 3 * i + channel;
            place[i] = element % kLanes;
            from[element / kLanes][element % kLanes] = -1;
        }
    }
};

DIFFCAM_INLINE Vec<float> third_of(const Vec<float>* vectors, const Third& third) {
    Ints mixed = {};
    for (int v = 0; v < 3; ++v) mixed |= (Ints)vectors[v].raw & load_ints(third.from[v]);
#if defined(__AVX512F__)
    return {_mm512_permutexvar_ps((__m512i)load_ints(third.place), (__m512)mixed)};
#else
    return {_mm256_permutevar8x32_ps((__m256)mixed, (__m256i)load_ints(third.place))};
#endif
}

// As many of a row as whole vectors hold; says how many.
template <typename P>
DIFFCAM_INLINE int64_t interleaved_vectors(const P* row, int64_t count, const Scratch scratch) {
    static constexpr Third kThirds[] = {Third(0), Third(1), Third(2)};
    int64_t x = 0;
    for (; x + kLanes <= count; x += kLanes) {
        Vec<float> vectors[3];
        for (int v = 0; v < 3; ++v) vectors[v] = pixel_vector(row + 3 * x + v * kLanes);
        for (int c = 0; c < 3; ++c) store(scratch.pixels(c) + x, third_of(vectors, kThirds[c]));
    }
    return x;
}
DIFFCAM_INLINE int64_t interleaved_vectors(const double*, int64_t, Scratch) { return 0; }

template <typename P>
DIFFCAM_INLINE int64_t planar_vectors(const P* row, int64_t count, float* out) {
    int64_t x = 0;
    for (; x + kLanes <= count; x += kLanes) store(out + x, pixel_vector(row + x));
    return x;
}
DIFFCAM_INLINE int64_t planar_vectors(const double*, int64_t, float*) { return 0; }
#else
template <typename P>
DIFFCAM_INLINE int64_t interleaved_vectors(const P*, int64_t, Scratch) {
    return 0;
}
template <typename P>
DIFFCAM_INLINE int64_t planar_vectors(const P*, int64_t, float*) {
    return 0;
}
#endif

template <typename P>
void load_pixels(const OverlayCall& call, int64_t image, int64_t y, const Scratch scratch) {
    const ConstView& view = call.images;
    const P* row = static_cast<const P*>(view.data) + image * view.image_stride + y * view.spatial_stride[1];
    const int64_t width = call.shape.width, stride = view.spatial_stride[2], channel = view.channel_stride;
    if (stride == 3 && channel == 1) {
        float *red = scratch.pixels(0), *green = scratch.pixels(1), *blue = scratch.pixels(2);
        for (int64_t x = interleaved_vectors(row, width, scratch); x < width; ++x) {
            red[x] = pixel(row[3 * x]);
            green[x] = pixel(row[3 * x + 1]);
            blue[x] = pixel(row[3 * x + 2]);
        }
        return;
    }
    for (int c = 0; c < 3; ++c) {
        const P* plane = row + c * channel;
        float* out = scratch.pixels(c);
        for (int64_t x = stride == 1 ? planar_vectors(plane, width, out) : 0; x < width; ++x)
            out[x] = pixel(plane[x * stride]);
    }
}

void load_pixels(const OverlayCall& call, int64_t image, int64_t y, const Scratch scratch) {
    switch (call.shape.pixel_type) {
        case PixelType::float32:
            return load_pixels<float>(call, image, y, scratch);
        case PixelType::float64:
            return load_pixels<double>(call, image, y, scratch);
        case PixelType::bfloat16:
            return load_pixels<BFloat16>(call, image, y, scratch);
        case PixelType::float16:
            return load_pixels<Half>(call, image, y, scratch);
        case PixelType::uint8:
            return load_pixels<uint8_t>(call, image, y, scratch);
    }
}

}  // namespace
}  // namespace DIFFCAM_CAPABILITY
}  // namespace diffcam
