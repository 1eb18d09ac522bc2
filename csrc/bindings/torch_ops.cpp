// The only file that sees torch headers, and of those only the LibTorch Stable ABI: one binary serves every
// torch >= 2.10. Turns tensors into strided views, allocates results and hands over PyTorch's thread pool.
// Schemas, shape inference and autograd are written in Python, where the same ops also exist without this
// library.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "diffcam/cam.h"
#include "diffcam/cpu_capability.h"
#include "diffcam/cuda.h"
#include "diffcam/logit_difference.h"
#include "diffcam/names.h"
#include "diffcam/overlay.h"
#include "diffcam/saliency_contrast.h"

namespace diffcam {

// A string argument of an op. PyTorch's own conversion to std::string (as of 2.13) leaks a string a call.
struct Name {
    std::string text;
};

}  // namespace diffcam

template <>
struct torch::stable::detail::ToImpl<diffcam::Name> {
    static diffcam::Name call(StableIValue value, uint64_t, bool) {
        StringHandle handle = torch::stable::detail::to<StringHandle>(value);
        const char* data = nullptr;
        size_t length = 0;
        TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
        TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
        diffcam::Name name{std::string(data, length)};
        TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
        return name;
    }
};

#ifdef DIFFCAM_HAS_CUDA
// Weak: a CPU build of PyTorch does not have it, and loads this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace {

using diffcam::Name;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

diffcam::ScalarType scalar_type(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return diffcam::ScalarType::float32;
        case ScalarType::Double:
            return diffcam::ScalarType::float64;
        case ScalarType::BFloat16:
            return diffcam::ScalarType::bfloat16;
        case ScalarType::Half:
            return diffcam::ScalarType::float16;
        default:
            STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
    }
    return diffcam::ScalarType::float32;
}

ScalarType accumulation_type(diffcam::ScalarType type) {
    return type == diffcam::ScalarType::float64 ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
    return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

diffcam::Parallel torch_threads() {
    auto run = [](const diffcam::Parallel&, int64_t count, void (*body)(void*, int64_t, int64_t),
                  void* context) {
        torch::stable::parallel_for(0, count, 1,
                                    [=](int64_t begin, int64_t end) { body(context, begin, end); });
    };
    return {static_cast<int>(torch::stable::get_num_threads()), run};
}

// Whether a call goes to the GPU, which is possible only where its kernels were compiled.
bool on_gpu(const Tensor& tensor) {
#ifdef DIFFCAM_HAS_CUDA
    return tensor.is_cuda();
#else
    (void)tensor;
    return false;
#endif
}

void check_device(const Tensor& tensor, const Tensor& first, const char* name) {
    STD_TORCH_CHECK(first.is_cpu() || on_gpu(first), "expected CPU or CUDA tensors");
    STD_TORCH_CHECK(tensor.device() == first.device(), name, ": expected the device of the first argument");
}

#ifdef DIFFCAM_HAS_CUDA
// The current stream of a tensor's device, which is the current device as long as this lives.
class Gpu {
  public:
    explicit Gpu(const Tensor& tensor) : tensor_(tensor), guard_(tensor.get_device_index()) {
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
        check(diffcam::cuda_queue(tensor.get_device_index(), stream, &queue));
        constexpr int kOldest = 80;
        STD_TORCH_CHECK(queue.capability >= kOldest,
                        "the compiled kernels need compute capability 8.0; device ",
                        tensor.get_device_index(), " has ", queue.capability / 10, ".", queue.capability % 10,
                        ": force the backend triton or reference");
    }

    // Memory from PyTorch's allocator, as long as this lives; null for no bytes.
    void* scratch(int64_t bytes) {
        if (bytes == 0) return nullptr;
        scratch_ = empty({bytes}, ScalarType::Byte, tensor_);
        return scratch_->mutable_data_ptr();
    }

    static void check(int error) {
        STD_TORCH_CHECK(error == 0, "CUDA error ", error, ": ", diffcam::cuda_error_text(error));
    }

    diffcam::CudaQueue queue{};

  private:
    const Tensor& tensor_;
    // Freed when the call returns: the allocator hands memory on in the order of the stream, so not before
    // the work queued here is done with it.
    std::optional<Tensor> scratch_;
    torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Strides of the last dimensions, right-aligned: networks with fewer than three spatial dimensions have
// leading ones.
template <typename AnyView>
void set_spatial_strides(AnyView& view, const Tensor& tensor, int64_t first) {
    const int64_t rank = tensor.dim() - first;
    for (int64_t i = 0; i < diffcam::kSpatialRank; ++i) {
        const int64_t dimension = i - (diffcam::kSpatialRank - rank);
        view.spatial_stride[i] = dimension < 0 ? 0 : tensor.stride(first + dimension);
    }
}

diffcam::ConstView activations_view(const Tensor& activations) {
    diffcam::ConstView view{
        activations.const_data_ptr(), activations.stride(0), 0, activations.stride(1), {}};
    set_spatial_strides(view, activations, 2);
    return view;
}

diffcam::ConstView gradients_view(const Tensor& gradients) {
    diffcam::ConstView view{
        gradients.const_data_ptr(), gradients.stride(0), gradients.stride(1), gradients.stride(2), {}};
    set_spatial_strides(view, gradients, 3);
    return view;
}

diffcam::CamShape cam_shape(const Tensor& activations, const Tensor& gradients) {
    const int64_t rank = activations.dim() - 2;
    STD_TORCH_CHECK(rank >= 1 && rank <= diffcam::kSpatialRank,
                    "activations: expected (N, C, *S) with 1 to 3 spatial dimensions; got ",
                    activations.dim(), " dimensions");
    const bool constant = gradients.dim() == 3;
    STD_TORCH_CHECK(constant || gradients.dim() == 3 + rank,
                    "gradients: expected (N, T, C, *S) or (N, T, C); got ", gradients.dim(), " dimensions");
    check_device(gradients, activations, "gradients");
    STD_TORCH_CHECK(activations.scalar_type() == gradients.scalar_type(),
                    "gradients: expected the dtype of activations");
    STD_TORCH_CHECK(gradients.size(0) == activations.size(0) && gradients.size(2) == activations.size(1),
                    "gradients: images or channels differ from those of activations");
    diffcam::CamShape shape{activations.size(0),
                            gradients.size(1),
                            activations.size(1),
                            {{1, 1, 1}},
                            scalar_type(activations, "activations"),
                            constant};
    for (int64_t i = 0; i < rank; ++i) {
        const int64_t size = activations.size(2 + i);
        STD_TORCH_CHECK(constant || gradients.size(3 + i) == size,
                        "gradients: positions differ from those of activations");
        shape.extent.size[diffcam::kSpatialRank - rank + i] = size;
    }
    return shape;
}

std::vector<int64_t> map_sizes(const Tensor& activations, const Tensor& gradients) {
    std::vector<int64_t> sizes{gradients.size(0), gradients.size(1)};
    for (int64_t i = 2; i < activations.dim(); ++i) sizes.push_back(activations.size(i));
    return sizes;
}

Tensor cam(const Tensor& activations, const Tensor& gradients, const Name& method, bool relu,
           const Name& normalize, double eps) {
    const diffcam::CamShape shape = cam_shape(activations, gradients);
    diffcam::CamMethod parsed_method;
    diffcam::Normalization parsed_normalize;
    STD_TORCH_CHECK(diffcam::parse_method(method.text.c_str(), &parsed_method), "method: unknown name ",
                    method.text);
    STD_TORCH_CHECK(diffcam::parse_normalization(normalize.text.c_str(), &parsed_normalize),
                    "normalize: unknown name ", normalize.text);
    Tensor maps = empty(map_sizes(activations, gradients), accumulation_type(shape.type), activations);
    const diffcam::ConstView a = activations_view(activations);
    const diffcam::ConstView g = gradients_view(gradients);
#ifdef DIFFCAM_HAS_CUDA
    if (on_gpu(activations)) {
        Gpu gpu(activations);
        void* scratch = gpu.scratch(diffcam::cam_cuda_scratch_bytes(shape, a, g, parsed_method, gpu.queue));
        Gpu::check(diffcam::cam_cuda(shape, a, g, parsed_method, relu, parsed_normalize, eps,
                                     maps.mutable_data_ptr(), scratch, gpu.queue));
        return maps;
    }
#endif
    diffcam::cam_cpu(shape, a, g, parsed_method, relu, parsed_normalize, eps, maps.mutable_data_ptr(),
                     torch_threads());
    return maps;
}

std::tuple<Tensor, Tensor> cam_backward(const Tensor& grad_raw, const Tensor& activations,
                                        const Tensor& gradients, const Name& method, bool for_activations,
                                        bool for_gradients) {
    const diffcam::CamShape shape = cam_shape(activations, gradients);
    diffcam::CamMethod parsed_method;
    STD_TORCH_CHECK(diffcam::parse_method(method.text.c_str(), &parsed_method), "method: unknown name ",
                    method.text);
    check_device(grad_raw, activations, "grad_raw");
    STD_TORCH_CHECK(grad_raw.scalar_type() == accumulation_type(shape.type),
                    "grad_raw: expected the maps' dtype");
    const std::vector<int64_t> sizes = map_sizes(activations, gradients);
    bool matches = grad_raw.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; matches && i < grad_raw.dim(); ++i) matches = grad_raw.size(i) == sizes[i];
    STD_TORCH_CHECK(matches, "grad_raw: expected the shape of the maps");
    const Tensor grad = torch::stable::contiguous(grad_raw);
    Tensor grad_activations = for_activations ? torch::stable::empty_like(activations)
                                              : empty({0}, activations.scalar_type(), activations);
    Tensor grad_gradients =
        for_gradients ? torch::stable::empty_like(gradients) : empty({0}, gradients.scalar_type(), gradients);
    diffcam::View activations_out{};
    if (for_activations) {
        activations_out = {grad_activations.mutable_data_ptr(),
                           grad_activations.stride(0),
                           0,
                           grad_activations.stride(1),
                           {}};
        set_spatial_strides(activations_out, grad_activations, 2);
    }
    diffcam::View gradients_out{};
    if (for_gradients) {
        gradients_out = {grad_gradients.mutable_data_ptr(),
                         grad_gradients.stride(0),
                         grad_gradients.stride(1),
                         grad_gradients.stride(2),
                         {}};
        set_spatial_strides(gradients_out, grad_gradients, 3);
    }
    const diffcam::ConstView a = activations_view(activations);
    const diffcam::ConstView g = gradients_view(gradients);
#ifdef DIFFCAM_HAS_CUDA
    if (on_gpu(activations)) {
        Gpu gpu(activations);
        void* scratch = gpu.scratch(diffcam::cam_backward_cuda_scratch_bytes(
            shape, a, g, parsed_method, for_activations, for_gradients, gpu.queue));
        Gpu::check(diffcam::cam_backward_cuda(shape, grad.const_data_ptr(), a, g, parsed_method,
                                              activations_out, gradients_out, scratch, gpu.queue));
        return {grad_activations, grad_gradients};
    }
#endif
    diffcam::cam_backward_cpu(shape, grad.const_data_ptr(), a, g, parsed_method, activations_out,
                              gradients_out, torch_threads());
    return {grad_activations, grad_gradients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_difference(const Tensor& logits, const Tensor& classes,
                                                            const Name& baseline, int64_t top_k,
                                                            double temperature, double alpha,
                                                            std::vector<int64_t> ranks) {
    check_device(classes, logits, "classes");
    STD_TORCH_CHECK(logits.dim() == 2 && classes.dim() == 2 && classes.size(0) == logits.size(0),
                    "expected logits (N, K) and classes (N, T)");
    STD_TORCH_CHECK(classes.scalar_type() == ScalarType::Long, "classes: expected int64");
    const diffcam::LogitDifferenceShape shape{logits.size(0), classes.size(1), logits.size(1),
                                              scalar_type(logits, "logits")};
    diffcam::LogitDifferenceOptions options{{},    top_k,        temperature,
                                            alpha, ranks.data(), static_cast<int64_t>(ranks.size())};
    STD_TORCH_CHECK(diffcam::parse_baseline(baseline.text.c_str(), &options.baseline),
                    "baseline: unknown name ", baseline.text);
    STD_TORCH_CHECK(shape.classes >= 2, "logits: expected at least two classes");
    STD_TORCH_CHECK(top_k >= 0 && top_k < shape.classes, "top_k: expected 0 to ", shape.classes - 1);
    for (const int64_t rank : ranks) {
        STD_TORCH_CHECK(rank >= 1 && rank < shape.classes, "ranks: expected 1 to ", shape.classes - 1);
    }
    const Tensor chosen = torch::stable::contiguous(classes);
    const int64_t* chosen_classes = static_cast<const int64_t*>(chosen.const_data_ptr());
    // Classes on a GPU are not read here: that would wait for it.
    for (int64_t i = 0; classes.is_cpu() && i < shape.images * shape.targets; ++i) {
        STD_TORCH_CHECK(chosen_classes[i] >= 0 && chosen_classes[i] < shape.classes,
                        "classes: expected 0 to ", shape.classes - 1, "; got ", chosen_classes[i]);
    }
    const bool finer = options.baseline == diffcam::Baseline::finer;
    STD_TORCH_CHECK(finer == (options.rank_count > 0), "ranks: expected some for finer, and none otherwise");
    const int64_t rivals = finer ? options.rank_count : top_k;
    const ScalarType type = accumulation_type(shape.type);
    Tensor delta = empty({shape.images, shape.targets}, type, logits);
    Tensor cotangent = empty({shape.images, shape.targets, shape.classes}, type, logits);
    Tensor rival_classes = empty({shape.images, shape.targets, rivals}, ScalarType::Long, logits);
    Tensor differences = empty({shape.images, shape.targets, rivals}, type, logits);
    const diffcam::LogitDifferenceResult result{delta.mutable_data_ptr(), cotangent.mutable_data_ptr(),
                                                static_cast<int64_t*>(rival_classes.mutable_data_ptr()),
                                                differences.mutable_data_ptr()};
#ifdef DIFFCAM_HAS_CUDA
    if (on_gpu(logits)) {
        STD_TORCH_CHECK(options.rank_count <= diffcam::kMostCudaRanks, "ranks: expected at most ",
                        diffcam::kMostCudaRanks, " on a GPU; got ", options.rank_count);
        Gpu gpu(logits);
        void* scratch = gpu.scratch(diffcam::logit_difference_cuda_scratch_bytes(shape, options, gpu.queue));
        Gpu::check(diffcam::logit_difference_cuda(shape, logits.const_data_ptr(), logits.stride(0),
                                                  logits.stride(1), chosen_classes, options, result, scratch,
                                                  gpu.queue));
        return {delta, cotangent, rival_classes, differences};
    }
#endif
    diffcam::logit_difference_cpu(shape, logits.const_data_ptr(), logits.stride(0), logits.stride(1),
                                  chosen_classes, options, result, torch_threads());
    return {delta, cotangent, rival_classes, differences};
}

diffcam::PixelType pixel_type(const Tensor& images) {
    if (images.scalar_type() == ScalarType::Byte) return diffcam::PixelType::uint8;
    return static_cast<diffcam::PixelType>(scalar_type(images, "images"));
}

Tensor overlay(const Tensor& maps, const Tensor& images, const Tensor& table, double opacity,
               const Name& normalize, const Name& blend, double eps) {
    STD_TORCH_CHECK(maps.dim() == 4 && images.dim() == 4 && images.size(1) == 3,
                    "expected maps (N, T, h, w) and images (N, 3, H, W)");
    STD_TORCH_CHECK(maps.size(0) == images.size(0), "maps: expected as many rows as there are images");
    STD_TORCH_CHECK(maps.size(2) > 0 && maps.size(3) > 0, "maps: expected at least one position");
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == diffcam::kOverlayColors && table.size(1) == 3 &&
                        table.scalar_type() == ScalarType::Float,
                    "table: expected float32 (", diffcam::kOverlayColors, ", 3)");
    STD_TORCH_CHECK(opacity >= 0 && opacity <= 1, "opacity: expected 0 to 1");
    check_device(images, maps, "images");
    check_device(table, maps, "table");
    const diffcam::OverlayShape shape{maps.size(0),
                                      maps.size(1),
                                      maps.size(2),
                                      maps.size(3),
                                      images.size(2),
                                      images.size(3),
                                      scalar_type(maps, "maps"),
                                      pixel_type(images)};
    diffcam::OverlayOptions options{static_cast<float>(opacity), {}, {}, eps};
    STD_TORCH_CHECK(diffcam::parse_normalization(normalize.text.c_str(), &options.normalize),
                    "normalize: unknown name ", normalize.text);
    STD_TORCH_CHECK(diffcam::parse_blend(blend.text.c_str(), &options.blend), "blend: unknown name ",
                    blend.text);
    const diffcam::ConstView map_view{
        maps.const_data_ptr(), maps.stride(0), maps.stride(1), 0, {0, maps.stride(2), maps.stride(3)}};
    const diffcam::ConstView image_view{images.const_data_ptr(),
                                        images.stride(0),
                                        0,
                                        images.stride(1),
                                        {0, images.stride(2), images.stride(3)}};
    const Tensor colors = torch::stable::contiguous(table);
    const float* color_values = static_cast<const float*>(colors.const_data_ptr());
    Tensor pictures =
        empty({shape.images, shape.targets, shape.height, shape.width, 3}, ScalarType::Byte, maps);
    uint8_t* bytes = static_cast<uint8_t*>(pictures.mutable_data_ptr());
#ifdef DIFFCAM_HAS_CUDA
    if (on_gpu(maps)) {
        Gpu gpu(maps);
        void* scratch = gpu.scratch(diffcam::overlay_cuda_scratch_bytes(shape, options, gpu.queue));
        Gpu::check(diffcam::overlay_cuda(shape, map_view, image_view, color_values, options, bytes, scratch,
                                         gpu.queue));
        return pictures;
    }
#endif
    diffcam::overlay_cpu(shape, map_view, image_view, color_values, options, bytes, torch_threads());
    return pictures;
}

Tensor saliency_contrast(const Tensor& saliency, const Tensor& rivals, bool per_channel) {
    const int64_t rank = saliency.dim() - 2;
    STD_TORCH_CHECK(rank >= 1 && rank <= diffcam::kSpatialRank && rivals.dim() == saliency.dim() + 1,
                    "expected saliency (N, C, *S) with 1 to 3 spatial dimensions and rivals (N, T, C, *S)");
    check_device(rivals, saliency, "rivals");
    STD_TORCH_CHECK(rivals.scalar_type() == saliency.scalar_type(), "rivals: expected the dtype of saliency");
    std::vector<int64_t> sizes{saliency.size(0), rivals.size(1)};
    for (int64_t i = 1; i < saliency.dim(); ++i) sizes.push_back(saliency.size(i));
    for (int64_t i = 0; i < rivals.dim(); ++i)
        STD_TORCH_CHECK(rivals.size(i) == sizes[i], "rivals: sizes differ from those of saliency");
    diffcam::SaliencyContrastShape shape{
        sizes[0], sizes[1], sizes[2], {{1, 1, 1}}, scalar_type(saliency, "saliency"), per_channel};
    for (int64_t i = 0; i < rank; ++i)
        shape.extent.size[diffcam::kSpatialRank - rank + i] = saliency.size(2 + i);
    Tensor contrast = empty(sizes, accumulation_type(shape.type), saliency);
    const diffcam::ConstView own = activations_view(saliency), others = gradients_view(rivals);
#ifdef DIFFCAM_HAS_CUDA
    if (on_gpu(saliency)) {
        Gpu gpu(saliency);
        void* scratch = gpu.scratch(diffcam::saliency_contrast_cuda_scratch_bytes(shape, gpu.queue));
        Gpu::check(diffcam::saliency_contrast_cuda(shape, own, others, contrast.mutable_data_ptr(), scratch,
                                                   gpu.queue));
        return contrast;
    }
#endif
    diffcam::saliency_contrast_cpu(shape, own, others, contrast.mutable_data_ptr(), torch_threads());
    return contrast;
}

// Asks for a variant by its number, or for none with -1, and says which one is in use.
int64_t cpu_capability(int64_t request) {
    if (request >= 0) diffcam::set_cpu_capability(static_cast<diffcam::CpuCapability>(request));
    return static_cast<int64_t>(diffcam::cpu_capability());
}

// Where to find PyTorch's threads, for calls that do not come by the dispatcher.
int64_t thread_pool() { return reinterpret_cast<int64_t>(&torch_threads); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffcam_fast, CPU, library) {
    library.impl("cam", TORCH_BOX(&cam));
    library.impl("cam_backward", TORCH_BOX(&cam_backward));
    library.impl("logit_difference", TORCH_BOX(&logit_difference));
    library.impl("overlay", TORCH_BOX(&overlay));
    library.impl("saliency_contrast", TORCH_BOX(&saliency_contrast));
}

#ifdef DIFFCAM_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(diffcam_fast, CUDA, library) {
    library.impl("cam", TORCH_BOX(&cam));
    library.impl("cam_backward", TORCH_BOX(&cam_backward));
    library.impl("logit_difference", TORCH_BOX(&logit_difference));
    library.impl("overlay", TORCH_BOX(&overlay));
    library.impl("saliency_contrast", TORCH_BOX(&saliency_contrast));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(diffcam_fast, CompositeExplicitAutograd, library) {
    library.impl("cpu_capability", TORCH_BOX(&cpu_capability));
    library.impl("thread_pool", TORCH_BOX(&thread_pool));
}
