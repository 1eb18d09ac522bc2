// What the DLPack standard, version 1.3, lays down in C for handing tensors from one library to another, as
// far as it is used here: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <stdint.h>

namespace diffcam {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4;

struct Version {
    uint32_t major, minor;
};

struct Device {
    int32_t type, id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

// Strides count elements.
struct Tensor {
    void* data;
    Device device;
    int32_t rank;
    DataType type;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ManagedTensor {
    Version version;
    void* context;
    void (*free)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// What the type of a library's tensors offers as its attribute __dlpack_c_exchange_api__, a capsule with the
// name "dlpack_exchange_api". Functions return 0, or -1 where they fail: with a Python exception, or for
// `allocate` after a call of set_error.
struct Exchange {
    Version version;
    Exchange* older;
    int (*allocate)(Tensor* like, ManagedTensor** made, void* context,
                    void (*set_error)(void* context, const char* kind, const char* message));
    int (*managed_from_object)(void* object, ManagedTensor** tensor);
    int (*object_from_managed)(ManagedTensor* tensor, void** object);
    int (*view_of_object)(void* object, Tensor* view);
    int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

}  // namespace dlpack
}  // namespace diffcam
