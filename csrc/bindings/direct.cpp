// An op's way through PyTorch's dispatcher is a large part of a small call, and largest right after a network
// has run, when the caches hold none of the code and none of the tables on that way. These functions read
// tensors by the C interface of DLPack instead. They serve plain calls alone: where anything might want to
// see the call (autograd, tracing, modes, transforms, a profiler), or an argument is not as it should be,
// they return None, and the op takes the call, or says what is wrong with it.

#include "direct.h"

#include <string.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "diffcam/cam.h"
#include "diffcam/logit_difference.h"
#include "diffcam/names.h"

namespace py = pybind11;

namespace diffcam {
namespace {

constexpr int kMostDimensions = 6;  // images, targets, channels and three of space

// What is known of PyTorch. Lives as long as the process.
struct {
    PyTypeObject* tensor = nullptr;
    const dlpack::Exchange* exchange = nullptr;
    Parallel (*threads)() = nullptr;
    PyObject* grad_enabled = nullptr;
    PyObject* is_negative = nullptr;
    PyObject* requires_grad = nullptr;
    std::vector<PyObject*> watchers;
} torch;

// Whether the object, a new reference, is there and false; an exception is forgotten.
bool is_false(PyObject* object) {
    const int truth = object == nullptr ? -1 : PyObject_IsTrue(object);
    Py_XDECREF(object);
    if (truth < 0) PyErr_Clear();
    return truth == 0;
}

// Whether nobody watches the call.
bool unwatched() {
    for (PyObject* watcher : torch.watchers)
        if (!is_false(PyObject_CallNoArgs(watcher))) return false;
    return true;
}

bool gradients_are_recorded() { return !is_false(PyObject_CallNoArgs(torch.grad_enabled)); }

// A view of a tensor that is nothing but its memory: on the CPU, with no gradient to record (if any is), not
// to be negated on the way.
bool plain_view(PyObject* object, bool records, dlpack::Tensor* view) {
    if (Py_TYPE(object) != torch.tensor) return false;
    if (records && !is_false(PyObject_GetAttr(object, torch.requires_grad))) return false;
    if (!is_false(PyObject_CallOneArg(torch.is_negative, object))) return false;
    if (torch.exchange->view_of_object(object, view) != 0) {
        PyErr_Clear();
        return false;
    }
    view->data = static_cast<char*>(view->data) + view->byte_offset;
    return view->device.type == dlpack::kCpu && view->rank <= kMostDimensions;
}

bool scalar_type(const dlpack::DataType& type, ScalarType* found) {
    if (type.lanes != 1) return false;
    if (type.code == dlpack::kBFloat) {
        *found = ScalarType::bfloat16;
        return type.bits == 16;
    }
    if (type.code != dlpack::kFloat) return false;
    *found = type.bits == 16   ? ScalarType::float16
             : type.bits == 64 ? ScalarType::float64
                               : ScalarType::float32;
    return type.bits == 16 || type.bits == 32 || type.bits == 64;
}

ScalarType accumulation_type(ScalarType type) {
    return type == ScalarType::float64 ? ScalarType::float64 : ScalarType::float32;
}

bool same_sizes(const int64_t* a, const int64_t* b, int count) {
    for (int i = 0; i < count; ++i)
        if (a[i] != b[i]) return false;
    return true;
}

// Strides of the last dimensions, from `first` on.
void set_spatial_strides(ConstView* view, const dlpack::Tensor& tensor, int first) {
    const int unused = kSpatialRank - (tensor.rank - first);
    for (int i = 0; i < kSpatialRank; ++i)
        view->spatial_stride[i] = i < unused ? 0 : tensor.strides[first + i - unused];
}

// False for what is no text, or holds a zero: it would count as the name that ends there.
bool text(PyObject* object, const char** found) {
    if (!PyUnicode_Check(object)) return false;
    Py_ssize_t length = 0;
    *found = PyUnicode_AsUTF8AndSize(object, &length);
    if (*found == nullptr) PyErr_Clear();
    return *found != nullptr && strlen(*found) == static_cast<size_t>(length);
}

void set_python_error(void*, const char*, const char* message) {
    PyErr_SetString(PyExc_RuntimeError, message);
}

dlpack::DataType element(ScalarType type) {
    return {dlpack::kFloat, static_cast<uint8_t>(8 * scalar_bytes(type)), 1};
}

// A tensor of PyTorch's: its object, made when what is in it is there.
class NewTensor {
  public:
    bool allocate(int64_t* shape, int rank, dlpack::DataType type) {
        dlpack::Tensor like{nullptr, {dlpack::kCpu, 0}, rank, type, shape, nullptr, 0};
        return torch.exchange->allocate(&like, &made_, nullptr, &set_python_error) == 0;
    }
    void* data() const { return static_cast<char*>(made_->tensor.data) + made_->tensor.byte_offset; }
    PyObject* object() {
        void* object = nullptr;
        // The reference to the tensor goes with it, whatever comes of it.
        dlpack::ManagedTensor* const given = made_;
        made_ = nullptr;
        return torch.exchange->object_from_managed(given, &object) == 0 ? static_cast<PyObject*>(object)
                                                                        : nullptr;
    }
    ~NewTensor() {
        if (made_ != nullptr) made_->free(made_);
    }

  private:
    dlpack::ManagedTensor* made_ = nullptr;
};

// Runs without the interpreter's lock; false, with a Python exception, where the body throws.
template <typename Body>
bool run_unlocked(const Body& body) {
    const char* error = nullptr;
    std::string message;
    PyThreadState* const state = PyEval_SaveThread();
    try {
        body();
    } catch (const std::exception& exception) {
        message = exception.what();
        error = message.c_str();
    }
    PyEval_RestoreThread(state);
    if (error != nullptr) PyErr_SetString(PyExc_RuntimeError, error);
    return error == nullptr;
}

struct CamCall {
    CamShape shape;
    ConstView activations, gradients;
    CamMethod method;
    Normalization normalize;
    double eps;
    int64_t sizes[kMostDimensions];
    int rank;  // of the maps
};

// always_targets: gradients have a target dimension; otherwise their shape says.
bool read_cam(PyObject* const* arguments, bool always_targets, CamCall* call) {
    const char *method = nullptr, *normalize = "none";
    if (!text(arguments[2], &method) || !parse_method(method, &call->method)) return false;
    if (!PyBool_Check(arguments[3])) return false;
    if (arguments[4] != Py_None && (!text(arguments[4], &normalize) || strcmp(normalize, "none") == 0))
        return false;
    if (!parse_normalization(normalize, &call->normalize) || !PyFloat_Check(arguments[5])) return false;
    call->eps = PyFloat_AS_DOUBLE(arguments[5]);
    const bool records = gradients_are_recorded();
    dlpack::Tensor a, g;
    if (!(call->eps > 0) || !plain_view(arguments[0], records, &a) || !plain_view(arguments[1], records, &g))
        return false;
    const int rank = a.rank - 2;
    ScalarType type;
    if (rank < 1 || rank > kSpatialRank || g.rank < 2 || !scalar_type(a.type, &type)) return false;
    if (a.type.code != g.type.code || a.type.bits != g.type.bits || g.type.lanes != 1) return false;
    const bool same = !always_targets && g.rank == a.rank && same_sizes(g.shape, a.shape, a.rank);
    const bool targets = !same && (g.rank == a.rank + 1 || g.rank == 3);
    const bool constant = !same && g.rank == (targets ? 3 : 2);
    const int channel = targets ? 2 : 1;
    if (always_targets && !targets) return false;
    if (g.rank != channel + 1 + (constant ? 0 : rank) || g.shape[0] != a.shape[0]) return false;
    if (!same_sizes(g.shape + channel, a.shape + 1, g.rank - channel)) return false;
    call->shape = {a.shape[0], targets ? g.shape[1] : 1, a.shape[1], {{1, 1, 1}}, type, constant};
    call->rank = 0;
    call->sizes[call->rank++] = a.shape[0];
    if (targets) call->sizes[call->rank++] = g.shape[1];
    for (int i = 0; i < rank; ++i) {
        call->shape.extent.size[kSpatialRank - rank + i] = a.shape[2 + i];
        call->sizes[call->rank++] = a.shape[2 + i];
    }
    call->activations = {a.data, a.strides[0], 0, a.strides[1], {}};
    set_spatial_strides(&call->activations, a, 2);
    call->gradients = {g.data, g.strides[0], targets ? g.strides[1] : 0, g.strides[channel], {}};
    set_spatial_strides(&call->gradients, g, channel + 1);
    return true;
}

// activations, gradients, method, relu, normalize, eps, whether gradients have a target dimension for certain
PyObject* cam(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    CamCall call;
    if (count != 7 || torch.tensor == nullptr || !unwatched() ||
        !read_cam(arguments, arguments[6] == Py_True, &call))
        Py_RETURN_NONE;
    const bool relu = arguments[3] == Py_True;
    NewTensor maps;
    if (!maps.allocate(call.sizes, call.rank, element(accumulation_type(call.shape.type)))) return nullptr;
    const bool done = run_unlocked([&] {
        cam_cpu(call.shape, call.activations, call.gradients, call.method, relu, call.normalize, call.eps,
                maps.data(), torch.threads());
    });
    return done ? maps.object() : nullptr;
}

struct LogitDifferenceCall {
    LogitDifferenceShape shape;
    LogitDifferenceOptions options;
    std::vector<int64_t> ranks;
    const void* logits;
    int64_t image_stride, class_stride;
    const int64_t* chosen;
    bool targets;  // classes have a target dimension
};

bool integer(PyObject* object, int64_t* found) {
    int overflow = 0;
    if (!PyLong_CheckExact(object)) return false;
    *found = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0;
}

// Different numbers of 1 and more; how large they may be depends on the logits.
bool ranks_of(PyObject* object, std::vector<int64_t>* ranks) {
    if (!PyTuple_CheckExact(object)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
        int64_t rank = 0;
        if (!integer(PyTuple_GET_ITEM(object, i), &rank) || rank < 1) return false;
        if (std::find(ranks->begin(), ranks->end(), rank) != ranks->end()) return false;
        ranks->push_back(rank);
    }
    return !ranks->empty();
}

// baseline, top_k, temperature, alpha, ranks: what does not apply to the baseline has to have its default.
bool read_options(PyObject* const* arguments, LogitDifferenceCall* call) {
    LogitDifferenceOptions& options = call->options;
    const char* baseline = nullptr;
    if (!text(arguments[0], &baseline) || !parse_baseline(baseline, &options.baseline)) return false;
    if (!PyFloat_Check(arguments[2]) || !PyFloat_Check(arguments[3])) return false;
    options.temperature = PyFloat_AS_DOUBLE(arguments[2]);
    options.alpha = PyFloat_AS_DOUBLE(arguments[3]);
    if (!(options.temperature > 0) || !std::isfinite(options.temperature) ||
        !ranks_of(arguments[4], &call->ranks))
        return false;
    const bool tempered = options.baseline == Baseline::logsumexp || options.baseline == Baseline::expected;
    if (!tempered && options.temperature != 1) return false;
    options.top_k = 0;
    if (arguments[1] != Py_None && (!integer(arguments[1], &options.top_k) || options.top_k < 1))
        return false;
    if (options.baseline == Baseline::finer) return options.top_k == 0 && std::isfinite(options.alpha);
    const bool defaults = options.alpha == 1 && call->ranks == std::vector<int64_t>{1, 2, 3};
    call->ranks.clear();
    return defaults;
}

bool read_logit_difference(PyObject* const* arguments, LogitDifferenceCall* call) {
    if (!read_options(arguments + 2, call)) return false;
    LogitDifferenceOptions& options = call->options;
    options.ranks = call->ranks.data();
    options.rank_count = static_cast<int64_t>(call->ranks.size());
    dlpack::Tensor logits, classes;
    const bool records = gradients_are_recorded();
    if (!plain_view(arguments[0], records, &logits) || !plain_view(arguments[1], records, &classes))
        return false;
    ScalarType type;
    if (logits.rank != 2 || !scalar_type(logits.type, &type)) return false;
    if (classes.type.code != dlpack::kInt || classes.type.bits != 64 || classes.type.lanes != 1) return false;
    if ((classes.rank != 1 && classes.rank != 2) || classes.shape[0] != logits.shape[0]) return false;
    call->targets = classes.rank == 2;
    call->shape = {logits.shape[0], call->targets ? classes.shape[1] : 1, logits.shape[1], type};
    if (call->shape.classes < 2 || options.top_k >= call->shape.classes) return false;
    for (const int64_t rank : call->ranks)
        if (rank >= call->shape.classes) return false;
    const int64_t count = call->shape.images * call->shape.targets;
    int64_t expected = 1;
    for (int i = classes.rank - 1; i >= 0; expected *= classes.shape[i--])
        if (classes.shape[i] > 1 && classes.strides[i] != expected) return false;
    call->chosen = static_cast<const int64_t*>(classes.data);
    for (int64_t i = 0; i < count; ++i)
        if (call->chosen[i] < 0 || call->chosen[i] >= call->shape.classes) return false;
    call->logits = logits.data;
    call->image_stride = logits.strides[0];
    call->class_stride = logits.strides[1];
    return true;
}

// logits, classes, baseline, top_k, temperature, alpha, ranks. Returns delta, cotangent, rivals and
// differences.
PyObject* logit_difference(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    LogitDifferenceCall call;
    if (count != 7 || torch.tensor == nullptr || !unwatched() || !read_logit_difference(arguments, &call))
        Py_RETURN_NONE;
    const dlpack::DataType type = element(accumulation_type(call.shape.type));
    const dlpack::DataType index{dlpack::kInt, 64, 1};
    int64_t sizes[3] = {call.shape.images, call.shape.targets, 0};
    const int rank = call.targets ? 2 : 1;
    const int64_t compared = call.options.top_k + call.options.rank_count;
    const bool compares = compared > 0;
    NewTensor results[4];
    if (!results[0].allocate(sizes, rank, type)) return nullptr;
    sizes[rank] = call.shape.classes;
    if (!results[1].allocate(sizes, rank + 1, type)) return nullptr;
    sizes[rank] = compared;
    if (compares &&
        (!results[2].allocate(sizes, rank + 1, index) || !results[3].allocate(sizes, rank + 1, type)))
        return nullptr;
    const LogitDifferenceResult where{results[0].data(), results[1].data(),
                                      compares ? static_cast<int64_t*>(results[2].data()) : nullptr,
                                      compares ? results[3].data() : nullptr};
    const bool done = run_unlocked([&] {
        logit_difference_cpu(call.shape, call.logits, call.image_stride, call.class_stride, call.chosen,
                             call.options, where, torch.threads());
    });
    PyObject* const tuple = done ? PyTuple_New(4) : nullptr;
    for (int i = 0; tuple != nullptr && i < 4; ++i) {
        PyObject* const object = i < 2 || compares ? results[i].object() : py::none().release().ptr();
        if (object == nullptr) {
            Py_DECREF(tuple);
            return nullptr;
        }
        PyTuple_SET_ITEM(tuple, i, object);
    }
    return tuple;
}

// Says where PyTorch is. watchers are called without arguments; one that is true, or fails, keeps calls on
// the dispatcher's way. Returns whether direct calls can be served.
bool connect(const py::type& tensor, const py::object& capsule, uintptr_t threads,
             const py::object& grad_enabled, const py::object& is_negative, const py::tuple& watchers) {
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
    auto exchange =
        static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (exchange != nullptr && exchange->version.major != dlpack::kMajorVersion)
        exchange = exchange->older;
    if (exchange == nullptr || exchange->view_of_object == nullptr) return false;
    torch.exchange = exchange;
    torch.threads = reinterpret_cast<Parallel (*)()>(threads);
    torch.grad_enabled = py::object(grad_enabled).release().ptr();
    torch.is_negative = py::object(is_negative).release().ptr();
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.watchers.clear();
    for (const py::handle& watcher : watchers)
        torch.watchers.push_back(py::object(watcher, true).release().ptr());
    torch.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
    return true;
}

PyMethodDef functions[] = {
    {"direct_cam", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cam)), METH_FASTCALL,
     "diffcam_fast.cam of plain CPU tensors, or None where the op has to serve the call."},
    {"direct_logit_difference",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&logit_difference)), METH_FASTCALL,
     "diffcam_fast.logit_difference of plain CPU tensors, or None where the op has to serve the call."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_calls(py::module_& module) {
    module.def("connect", &connect,
               "Say where PyTorch is; returns whether the functions direct_* can serve calls.");
    if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace diffcam
