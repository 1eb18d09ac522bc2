// What the gradients of a raw map are made of, channel by channel and element by element; the formulas and
// their names are those of diffcam_fast/reference/cam.py.
#pragma once

#include "diffcam/cam.h"
#include "elements.h"

namespace diffcam {

// Sums over the positions of a channel.
template <typename T>
struct ChannelSums {
    T weight;   // of what the weight of the channel sums
    T product;  // of the map's gradient times activations: the gradient of the weight
    T squares;  // gradcam++ only: of the squares of what the weight sums
};

// What a channel has for one target after its sums.
template <typename T>
struct ChannelTerms {
    T weight;  // of the activations
    T slope;   // gradient of the weight, divided by what the weight is divided by
};

template <typename T>
__device__ __forceinline__ T rectified(T x) {
    return x < T(0) ? T(0) : x;  // NaN stays
}

template <typename T>
__device__ __forceinline__ T counted(T evidence) {
    return evidence > T(0) ? T(1) : T(0);
}

// gradcam++: what the weight sums, f = g^3 / d, and its derivative.
template <typename T>
struct PlusPlus {
    static constexpr double kEps = 1e-6;
    T positive, square, divisor;

    __device__ __forceinline__ PlusPlus(T gradient, T total)
        : positive(rectified(gradient)),
          square(positive * positive),
          divisor(T(2) * square + total * square * positive + static_cast<T>(kEps)) {}
    __device__ __forceinline__ T value() const { return positive * square / divisor; }
    __device__ __forceinline__ T derivative() const {
        return square * (T(2) * square + static_cast<T>(3 * kEps)) / divisor / divisor;
    }
};

constexpr double kXGradCamEps = 1e-7;

template <typename T>
__device__ __forceinline__ void add_position(CamMethod method, T a, T g, T grad_raw, T total,
                                             ChannelSums<T>& sums) {
    const bool gated = method == CamMethod::elementwise;
    sums.product += gated ? grad_raw * a * counted(g * a) : grad_raw * a;
    if (method == CamMethod::gradcam) sums.weight += g;
    if (method == CamMethod::xgradcam) sums.weight += g * a;
    if (method == CamMethod::gradcam_plus_plus) {
        const T value = PlusPlus<T>(g, total).value();
        sums.weight += value;
        sums.squares += value * value;
    }
}

// The terms of a channel whose gradients are given position by position. `offset` is what the gradient of the
// activations has at every position, whatever the target.
template <typename T>
__device__ __forceinline__ ChannelTerms<T> terms_of(CamMethod method, const ChannelSums<T>& sums, T total,
                                                    T positions, T& offset) {
    if (method == CamMethod::gradcam) return {sums.weight / positions, sums.product / positions};
    if (method == CamMethod::xgradcam) {
        const T divisor = total + static_cast<T>(kXGradCamEps);
        const T weight = sums.weight / divisor, slope = sums.product / divisor;
        offset -= slope * weight;
        return {weight, slope};
    }
    offset -= sums.product * sums.squares;
    return {sums.weight, sums.product};
}

// The same for a gradient that all positions have; `result` is the gradient with respect to it.
template <typename T>
__device__ __forceinline__ ChannelTerms<T> terms_of_constant(CamMethod method, T g, T product, T total,
                                                             T positions, T& offset, T& result) {
    result = product;
    if (method == CamMethod::xgradcam) {
        const T divisor = total + static_cast<T>(kXGradCamEps);
        const T weight = g * total / divisor, slope = product / divisor;
        offset += slope * (g - weight);
        result = slope * total;
        return {weight, slope};
    }
    if (method == CamMethod::gradcam_plus_plus) {
        const PlusPlus<T> at(g, total);
        offset -= product * positions * at.value() * at.value();
        result = product * positions * at.derivative();
        return {positions * at.value(), product};
    }
    if (method == CamMethod::layercam) {
        result = product * counted(g);
        return {g * counted(g), product};
    }
    return {g, product};
}

// One target's share of the gradient of an activation. g: the terms' weight where gradients are constant.
template <typename T>
__device__ __forceinline__ T of_activation(CamMethod method, bool constant, T a, T g, T grad_raw,
                                           const ChannelTerms<T>& terms) {
    switch (method) {
        case CamMethod::elementwise:
            return grad_raw * g * counted(g * a);
        case CamMethod::hirescam:
            return grad_raw * g;
        case CamMethod::layercam:
            return constant ? grad_raw * g : grad_raw * g * counted(g);
        case CamMethod::xgradcam:
            return constant ? grad_raw * g : grad_raw * terms.weight + terms.slope * g;
        default:
            return grad_raw * terms.weight;
    }
}

// The gradient of a gradient that is not constant.
template <typename T>
__device__ __forceinline__ T of_gradient(CamMethod method, T a, T g, T grad_raw, T total,
                                         const ChannelTerms<T>& terms) {
    switch (method) {
        case CamMethod::elementwise:
            return grad_raw * a * counted(g * a);
        case CamMethod::hirescam:
            return grad_raw * a;
        case CamMethod::layercam:
            return grad_raw * a * counted(g);
        case CamMethod::xgradcam:
            return terms.slope * a;
        case CamMethod::gradcam_plus_plus:
            return terms.slope * PlusPlus<T>(g, total).derivative();
        default:
            return terms.slope;
    }
}

}  // namespace diffcam
