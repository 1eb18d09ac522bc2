// Right after a forward pass a walk over a network's modules waits for memory nearly all of its time: the
// object, the dictionary of its attributes and the table in that, one after the other, module by module. This
// walk knows what it will come to, and asks for the memory of several modules at a time.

#include "training_flags.h"

#include <Python.h>

#include <cstddef>
#include <unordered_set>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace diffcam {
namespace {

constexpr size_t kLine = 64;
// How many modules ahead of the walk dictionaries are looked up, and their tables asked for.
constexpr size_t kDictionariesAhead = 8, kTablesAhead = 4;
// Of a table: its head and index, and the entries of the attributes that every module has.
constexpr size_t kTableLines = 6;

void ask_for(const void* address, size_t lines) {
    for (size_t line = 0; line < lines; ++line) {
        __builtin_prefetch(static_cast<const char*>(address) + line * kLine);
    }
}

// The interpreter may collect garbage, and so run anything, where it makes an object's dictionary.
struct NoCollection {
    NoCollection() : enabled(PyGC_Disable()) {}
    ~NoCollection() {
        if (enabled) PyGC_Enable();
    }
    int enabled;
};

struct Visited {
    PyObject* module;
    PyObject* attributes;
};

}  // namespace

py::object modules_in_training(const py::object& model) {
    static PyObject* const training = PyUnicode_InternFromString("training");
    static PyObject* const modules = PyUnicode_InternFromString("_modules");
    const NoCollection no_collection;
    // Borrowed references: no code of anybody else's runs here, so that what is there stays there.
    std::vector<Visited> found{{model.ptr(), nullptr}};
    std::unordered_set<PyObject*> parents;
    py::list raised;
    size_t dictionaries = 0, tables = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        for (; dictionaries < found.size() && dictionaries <= i + kDictionariesAhead; ++dictionaries) {
            PyObject** const attributes = _PyObject_GetDictPtr(found[dictionaries].module);
            if (attributes == nullptr || *attributes == nullptr || !PyDict_CheckExact(*attributes)) {
                PyErr_Clear();
                return py::none();
            }
            found[dictionaries].attributes = *attributes;
        }
        for (; tables < dictionaries && tables <= i + kTablesAhead; ++tables) {
            ask_for(reinterpret_cast<PyDictObject*>(found[tables].attributes)->ma_keys, kTableLines);
        }
        const Visited visited = found[i];
        PyObject* const children = PyDict_GetItemWithError(visited.attributes, modules);
        PyObject* const flag = PyDict_GetItemWithError(visited.attributes, training);
        if (children == nullptr || flag == nullptr || !PyDict_Check(children) || !PyBool_Check(flag)) {
            PyErr_Clear();
            return py::none();
        }
        if (PyDict_Size(children) > 0) {
            if (!parents.insert(visited.module).second) continue;
            PyObject* child = nullptr;
            Py_ssize_t position = 0;
            while (PyDict_Next(children, &position, nullptr, &child)) {
                if (child == Py_None) continue;
                // Where an object's dictionary is stands before the object or at its end.
                ask_for(reinterpret_cast<const char*>(child) - kLine / 2, 2);
                found.push_back({child, nullptr});
            }
        }
        if (flag == Py_True) raised.append(py::handle(visited.module));
    }
    return std::move(raised);
}

}  // namespace diffcam
