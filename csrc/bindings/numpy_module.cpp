// Module _C: the kernels on NumPy arrays, without torch tensors, what this binary was built from, and what
// walks over Python objects. Arguments are checked in Python (diffcam_fast/numpy.py); what is checked again
// here is what memory safety needs.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

#include "bindings/direct.h"
#include "bindings/training_flags.h"
#include "diffcam/cam.h"
#include "diffcam/cpu_capability.h"
#include "diffcam/logit_difference.h"
#include "diffcam/names.h"

namespace py = pybind11;

namespace {

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

diffcam::ScalarType scalar_type(const std::string& name) {
    if (name == "float32") return diffcam::ScalarType::float32;
    if (name == "float64") return diffcam::ScalarType::float64;
    if (name == "bfloat16") return diffcam::ScalarType::bfloat16;
    require(name == "float16", "expected float32, float64, bfloat16 or float16");
    return diffcam::ScalarType::float16;
}

// Splits a loop over short-lived threads. A caller that wants one thread pays for none.
diffcam::Parallel plain_threads(int threads) {
    auto run = [](const diffcam::Parallel& self, int64_t count, void (*body)(void*, int64_t, int64_t),
                  void* context) {
        const int64_t workers = count < self.threads ? count : self.threads;
        std::vector<std::thread> others;
        others.reserve(static_cast<size_t>(workers));
        int64_t started = 1;
        try {
            for (; started < workers; ++started) {
                others.emplace_back(body, context, count * started / workers,
                                    count * (started + 1) / workers);
            }
        } catch (const std::system_error&) {
            // The system gives no more threads: what is left over is done here.
            body(context, count * started / workers, count);
        }
        body(context, 0, count / workers);
        for (std::thread& other : others) other.join();
    };
    return {threads, run};
}

template <typename AnyView>
void set_spatial_strides(AnyView& view, const py::array& array, int first) {
    const int rank = static_cast<int>(array.ndim()) - first;
    for (int i = 0; i < diffcam::kSpatialRank; ++i) {
        const int dimension = i - (diffcam::kSpatialRank - rank);
        view.spatial_stride[i] = dimension < 0 ? 0 : array.strides(first + dimension) / array.itemsize();
    }
}

int64_t stride(const py::array& array, int dimension) { return array.strides(dimension) / array.itemsize(); }

// NumPy has arrays whose strides are no multiple of the item (fields of records): those the caller must copy.
void require_whole_strides(const py::array& array) {
    for (int i = 0; i < array.ndim(); ++i) {
        require(array.strides(i) % array.itemsize() == 0, "strides must be multiples of the item size");
    }
}

py::array empty(const std::vector<int64_t>& sizes, diffcam::ScalarType type) {
    if (type == diffcam::ScalarType::float64) return py::array_t<double>(sizes);
    return py::array_t<float>(sizes);
}

// activations (N, C, *S), gradients (N, T, C, *S) or (N, T, C); dtype names what the items are.
py::array cam(const py::array& activations, const py::array& gradients, const std::string& dtype,
              const std::string& method, bool relu, const std::string& normalize, double eps, int threads) {
    const int rank = static_cast<int>(activations.ndim()) - 2;
    const bool constant = gradients.ndim() == 3;
    require(rank >= 1 && rank <= diffcam::kSpatialRank, "activations: expected (N, C, *S)");
    require(constant || gradients.ndim() == rank + 3, "gradients: expected (N, T, C, *S) or (N, T, C)");
    require(gradients.shape(0) == activations.shape(0) && gradients.shape(2) == activations.shape(1),
            "gradients: images or channels differ from those of activations");
    require(threads >= 1, "threads: expected at least 1");
    diffcam::CamShape shape{activations.shape(0), gradients.shape(1), activations.shape(1),
                            {{1, 1, 1}},          scalar_type(dtype), constant};
    require(activations.itemsize() == diffcam::scalar_bytes(shape.type) &&
                gradients.itemsize() == diffcam::scalar_bytes(shape.type),
            "dtype: does not have the arrays' item size");
    std::vector<int64_t> sizes{shape.images, shape.targets};
    for (int i = 0; i < rank; ++i) {
        const int64_t size = activations.shape(2 + i);
        require(constant || gradients.shape(3 + i) == size,
                "gradients: positions differ from those of activations");
        shape.extent.size[diffcam::kSpatialRank - rank + i] = size;
        sizes.push_back(size);
    }
    require_whole_strides(activations);
    require_whole_strides(gradients);
    diffcam::CamMethod parsed_method;
    diffcam::Normalization parsed_normalize;
    require(diffcam::parse_method(method.c_str(), &parsed_method), "method: unknown name");
    require(diffcam::parse_normalization(normalize.c_str(), &parsed_normalize), "normalize: unknown name");
    diffcam::ConstView a{activations.data(), stride(activations, 0), 0, stride(activations, 1), {}};
    set_spatial_strides(a, activations, 2);
    diffcam::ConstView g{
        gradients.data(), stride(gradients, 0), stride(gradients, 1), stride(gradients, 2), {}};
    set_spatial_strides(g, gradients, 3);
    py::array maps = empty(sizes, shape.type);
    void* const finished = maps.mutable_data();
    {
        py::gil_scoped_release release;
        diffcam::cam_cpu(shape, a, g, parsed_method, relu, parsed_normalize, eps, finished,
                         plain_threads(threads));
    }
    return maps;
}

// logits (N, K), classes (N, T) contiguous.
std::tuple<py::array, py::array, py::array, py::array> logit_difference(
    const py::array& logits, const py::array_t<int64_t, py::array::c_style>& classes,
    const std::string& dtype, const std::string& baseline, int64_t top_k, double temperature, double alpha,
    const std::vector<int64_t>& ranks, int threads) {
    require(logits.ndim() == 2 && classes.ndim() == 2 && logits.shape(0) == classes.shape(0),
            "expected logits (N, K) and classes (N, T)");
    require(threads >= 1, "threads: expected at least 1");
    const diffcam::LogitDifferenceShape shape{logits.shape(0), classes.shape(1), logits.shape(1),
                                              scalar_type(dtype)};
    require(logits.itemsize() == diffcam::scalar_bytes(shape.type),
            "dtype: does not have the logits' item size");
    require_whole_strides(logits);
    require(shape.classes >= 2, "logits: expected at least two classes");
    require(top_k >= 0 && top_k < shape.classes, "top_k: out of range");
    for (const int64_t rank : ranks) {
        require(rank >= 1 && rank < shape.classes, "ranks: out of range");
    }
    for (int64_t i = 0; i < classes.size(); ++i) {
        require(classes.data()[i] >= 0 && classes.data()[i] < shape.classes, "classes: out of range");
    }
    diffcam::LogitDifferenceOptions options{{},    top_k,        temperature,
                                            alpha, ranks.data(), static_cast<int64_t>(ranks.size())};
    require(diffcam::parse_baseline(baseline.c_str(), &options.baseline), "baseline: unknown name");
    const bool finer = options.baseline == diffcam::Baseline::finer;
    require(finer == (options.rank_count > 0), "ranks: expected some for finer, and none otherwise");
    const int64_t rivals = finer ? options.rank_count : top_k;
    py::array delta = empty({shape.images, shape.targets}, shape.type);
    py::array cotangent = empty({shape.images, shape.targets, shape.classes}, shape.type);
    py::array_t<int64_t> rival_classes({shape.images, shape.targets, rivals});
    py::array differences = empty({shape.images, shape.targets, rivals}, shape.type);
    // Arrays are Python objects: nothing of theirs is asked for without the interpreter's lock.
    const void* const values = logits.data();
    const int64_t* const chosen = classes.data();
    const diffcam::LogitDifferenceResult result{delta.mutable_data(), cotangent.mutable_data(),
                                                rival_classes.mutable_data(), differences.mutable_data()};
    const int64_t image_stride = stride(logits, 0), class_stride = stride(logits, 1);
    {
        py::gil_scoped_release release;
        diffcam::logit_difference_cpu(shape, values, image_stride, class_stride, chosen, options, result,
                                      plain_threads(threads));
    }
    return {delta, cotangent, rival_classes, differences};
}

py::dict build_information() {
    py::dict information;
    information["compiler"] = __VERSION__;
    information["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
        PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
    py::list variants;
#ifdef DIFFCAM_HAS_STANDARD
    variants.append("default");
#endif
#ifdef DIFFCAM_HAS_AVX2
    variants.append("avx2");
#endif
#ifdef DIFFCAM_HAS_AVX512
    variants.append("avx512");
#endif
    information["cpu_variants"] = variants;
    return information;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels on NumPy arrays; use diffcam_fast.numpy, which checks arguments.";
    module.def("cam", &cam);
    module.def("logit_difference", &logit_difference);
    module.def(
        "modules_in_training", &diffcam::modules_in_training,
        "The modules of a torch.nn.Module whose flag `training` is up; None if it is not an ordinary one.");
    diffcam::add_direct_calls(module);
    module.def("build_information", &build_information, "Compiler, pybind11 and compiled CPU variants.");
    module.def(
        "cpu_capability", [] { return std::string(diffcam::cpu_capability_name(diffcam::cpu_capability())); },
        "The instruction-set variant in use: default, avx2 or avx512.");
    module.def(
        "best_cpu_capability",
        [] { return std::string(diffcam::cpu_capability_name(diffcam::best_cpu_capability())); },
        "The best variant that this processor runs.");
    module.def(
        "set_cpu_capability",
        [](const std::string& name) {
            diffcam::CpuCapability wanted;
            require(diffcam::parse_cpu_capability(name.c_str(), &wanted),
                    "name: expected default, avx2 or avx512");
            return diffcam::set_cpu_capability(wanted);
        },
        "Choose a variant; False if this processor does not run it.");
}
