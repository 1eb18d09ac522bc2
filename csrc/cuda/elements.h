// Element types of the ops' tensors, the type that their sums are taken in, and wide accesses to them.
#pragma once

#include "diffcam/tensor_view.h"
#include "runtime.h"

namespace diffcam {

template <typename E>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <typename E>
using Accumulator = typename AccumulatorOf<E>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float x, __half* out) { *out = __float2half(x); }

// Neighbours that one access moves, where their address allows it.
template <typename E, int kCount>
struct alignas(sizeof(E) * kCount) Pack {
    E element[kCount];
};

// Calls body(value of the element type) with the type that tensors have; its result, an error code.
template <typename Body>
int with_element_type(ScalarType type, Body body) {
    switch (type) {
        case ScalarType::float32:
            return body(float());
        case ScalarType::float64:
            return body(double());
        case ScalarType::bfloat16:
            return body(__nv_bfloat16());
        case ScalarType::float16:
            return body(__half());
    }
    return cudaErrorInvalidValue;
}

}  // namespace diffcam
