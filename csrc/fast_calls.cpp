// Calls that a decoder makes again in every layer and step, told by what they look like: what
// medusa_kernels/_calls.py does in Python, in a tenth of the time. Tensors are read through
// PyTorch's C functions for DLPack, so that nothing here depends on its C++, nor on the version of
// Python.
#define Py_LIMITED_API 0x030a0000
#include <ATen/dlpack.h>
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

// As in csrc/plans.h: a call by its plan; what went wrong, or null.
using Launch = const char* (*)(const void* plan, const uint64_t* addresses, void* stream);

struct Entry {
    PyObject* again;  // owned
    Launch launch;    // in its place, or null
    const void* plan;
    int32_t device;  // a GPU's, or -1
};

struct Calls {
    PyObject_HEAD;
    const DLPackExchangeAPI* api;
    PyObject* types[2];  // of tensors that can be told by what is looked at here
    std::unordered_map<std::string, Entry>* entries;
};

constexpr size_t kMostEntries = 4096;

template <typename T>
void append(std::string& key, const T& x) {
    key.append(reinterpret_cast<const char*>(&x), sizeof x);
}

// What tensors look like, those of a tuple or list among them too.
class Looks {
 public:
    Looks(const Calls& calls, std::string& key, std::vector<uint64_t>& addresses)
        : calls_(calls), key_(key), addresses_(addresses) {}

    // Of a tensor, None, or a tuple or list of them. False: not to be told.
    bool add(PyObject* x) {
        if (PyTuple_Check(x)) return add_all(x, PyTuple_Size, PyTuple_GetItem);
        if (PyList_Check(x)) return add_all(x, PyList_Size, PyList_GetItem);
        return add_tensor(x);
    }

 private:
    template <typename Size, typename Item>
    bool add_all(PyObject* sequence, Size size, Item item) {
        key_.push_back('(');
        const Py_ssize_t count = size(sequence);
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (!add_tensor(item(sequence, i))) return false;
        }
        key_.push_back(')');
        return true;
    }

    // Shape, strides, dtype, device and the address modulo 16.
    bool add_tensor(PyObject* x) {
        if (x == Py_None) {
            addresses_.push_back(0);
            key_.push_back('-');
            return true;
        }
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        if (type != calls_.types[0] && type != calls_.types[1]) return false;
        DLTensor t;
        if (calls_.api->dltensor_from_py_object_no_sync(x, &t) != 0) {
            PyErr_Clear();
            return false;
        }
        const uint64_t address = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
        // Caches of a model's layers look the same: a mark for all but the first keeps keys short.
        if (last_.ndim > 0 && same(t, last_) && address % 16 == last_address_ % 16) {
            key_.push_back('=');
        } else {
            key_.push_back(static_cast<char>(address % 16));
            append(key_, t.dtype);
            append(key_, t.device);
            append(key_, t.ndim);
            if (t.ndim > 0) {
                key_.append(reinterpret_cast<const char*>(t.shape), t.ndim * sizeof(int64_t));
                key_.append(reinterpret_cast<const char*>(t.strides), t.ndim * sizeof(int64_t));
            }
        }
        addresses_.push_back(address);
        last_ = t;
        last_address_ = address;
        return true;
    }

    static bool same(const DLTensor& a, const DLTensor& b) {
        return a.ndim == b.ndim && a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits &&
               a.dtype.lanes == b.dtype.lanes && a.device.device_type == b.device.device_type &&
               a.device.device_id == b.device.device_id &&
               std::equal(a.shape, a.shape + a.ndim, b.shape) &&
               std::equal(a.strides, a.strides + a.ndim, b.strides);
    }

    const Calls& calls_;
    std::string& key_;
    std::vector<uint64_t>& addresses_;
    DLTensor last_{};  // the tensor before; its shape and strides are the tensor's own
    uint64_t last_address_ = 0;
};

bool append_option(PyObject* x, std::string& key) {
    if (x == Py_None) {
        key.push_back('-');
    } else if (PyBool_Check(x)) {
        key.push_back(x == Py_True ? 'T' : 'F');
    } else if (PyFloat_CheckExact(x)) {
        key.push_back('f');
        append(key, PyFloat_AsDouble(x));
    } else if (PyLong_CheckExact(x)) {
        const int64_t value = PyLong_AsLongLong(x);
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        key.push_back('i');
        append(key, value);
    } else {
        return false;
    }
    return true;
}

// What `tensors` and `options`, both tuples, look like. False: not to be told, or not tuples, for
// which Python's error is set.
bool signature(const Calls& calls, PyObject* tensors, PyObject* options, std::string& key,
               std::vector<uint64_t>& addresses) {
    key.clear();
    addresses.clear();
    const Py_ssize_t count = PyTuple_Size(tensors), others = PyTuple_Size(options);
    if (count < 0 || others < 0) return false;
    Looks looks(calls, key, addresses);
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!looks.add(PyTuple_GetItem(tensors, i))) return false;
    }
    key.push_back('|');
    for (Py_ssize_t i = 0; i < others; ++i) {
        if (!append_option(PyTuple_GetItem(options, i), key)) return false;
    }
    return true;
}

bool check_count(const char* name, Py_ssize_t got, Py_ssize_t expected) {
    if (got == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, expected, got);
    return false;
}

PyObject* none_unless_error() {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
}

void forget(Calls& calls) {
    auto entries = std::move(*calls.entries);  // as what is released may run anything
    calls.entries->clear();
    for (auto& [key, entry] : entries) Py_DECREF(entry.again);
}

// The entry of arguments (tensors, options), with its addresses left in `addresses`.
const Entry* find(Calls& calls, const char* name, PyObject* const* args, Py_ssize_t count,
                  std::vector<uint64_t>& addresses) {
    static thread_local std::string key;
    if (!check_count(name, count, 2) || !signature(calls, args[0], args[1], key, addresses)) {
        return nullptr;
    }
    const auto found = calls.entries->find(key);
    return found == calls.entries->end() ? nullptr : &found->second;
}

PyObject* calls_call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Calls& calls = *reinterpret_cast<Calls*>(self);
    static thread_local std::vector<uint64_t> addresses;
    const Entry* found = find(calls, "call", args, count, addresses);
    if (!found) return none_unless_error();
    if (found->launch) {
        void* stream = nullptr;
        if (found->device >= 0 &&
            calls.api->current_work_stream(kDLCUDA, found->device, &stream) != 0) {
            return nullptr;
        }
        if (const char* error = found->launch(found->plan, addresses.data(), stream)) {
            PyErr_SetString(PyExc_RuntimeError, error);
            return nullptr;
        }
        Py_RETURN_TRUE;
    }
    PyObject* again = found->again;
    Py_INCREF(again);
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(addresses.size()));
    for (size_t i = 0; list && i < addresses.size(); ++i) {
        PyList_SetItem(list, static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(addresses[i]));
    }
    PyObject* result = list ? PyObject_CallFunctionObjArgs(again, list, nullptr) : nullptr;
    Py_XDECREF(list);
    Py_DECREF(again);
    return result;
}

PyObject* calls_find(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    static thread_local std::vector<uint64_t> addresses;
    const Entry* found = find(*reinterpret_cast<Calls*>(self), "find", args, count, addresses);
    if (!found) return none_unless_error();
    Py_INCREF(found->again);
    return found->again;
}

PyObject* calls_remember(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Calls& calls = *reinterpret_cast<Calls*>(self);
    std::string key;
    std::vector<uint64_t> addresses;
    if (!check_count("remember", count, 3) || !signature(calls, args[0], args[1], key, addresses)) {
        return none_unless_error();
    }
    Entry entry{args[2], nullptr, nullptr, 0};
    if (PyObject* native = PyObject_GetAttrString(args[2], "native")) {
        unsigned long long launch, plan;
        const bool ok = PyArg_ParseTuple(native, "KKi", &launch, &plan, &entry.device);
        Py_DECREF(native);
        if (!ok) return nullptr;
        entry.launch = reinterpret_cast<Launch>(launch);
        entry.plan = reinterpret_cast<const void*>(plan);
    } else {
        PyErr_Clear();
    }
    if (calls.entries->size() >= kMostEntries) forget(calls);
    Py_INCREF(entry.again);
    const auto [place, is_new] = calls.entries->try_emplace(std::move(key), entry);
    if (!is_new) Py_DECREF(std::exchange(place->second, entry).again);
    Py_RETURN_NONE;
}

PyObject* calls_clear(PyObject* self, PyObject*) {
    forget(*reinterpret_cast<Calls*>(self));
    Py_RETURN_NONE;
}

PyObject* calls_values(PyObject* self, PyObject*) {
    PyObject* list = PyList_New(0);
    for (const auto& [key, entry] : *reinterpret_cast<Calls*>(self)->entries) {
        if (!list || PyList_Append(list, entry.again) != 0) break;
    }
    return list;
}

// Of PyTorch's `DLPackExchangeAPI` and the two types of tensors.
PyObject* calls_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *capsule, *types[2];
    if (!PyArg_ParseTuple(args, "OOO", &capsule, &types[0], &types[1])) return nullptr;
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (!api) return nullptr;
    if (api->header.version.major != DLPACK_MAJOR_VERSION ||
        !api->dltensor_from_py_object_no_sync) {
        PyErr_Format(PyExc_ImportError, "DLPack %d.%d: expected %d", api->header.version.major,
                     api->header.version.minor, DLPACK_MAJOR_VERSION);
        return nullptr;
    }
    const auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = alloc(type, 0);
    if (!self) return nullptr;
    Calls& calls = *reinterpret_cast<Calls*>(self);
    calls.api = api;
    calls.entries = new std::unordered_map<std::string, Entry>;
    for (int i = 0; i < 2; ++i) {
        Py_INCREF(types[i]);
        calls.types[i] = types[i];
    }
    return self;
}

void calls_dealloc(PyObject* self) {
    Calls& calls = *reinterpret_cast<Calls*>(self);
    if (calls.entries) forget(calls);
    delete calls.entries;
    for (PyObject* type : calls.types) Py_XDECREF(type);
    PyTypeObject* type = Py_TYPE(self);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

template <typename F>
PyCFunction method(F function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef calls_methods[] = {{"call", method(calls_call), METH_FASTCALL, nullptr},
                               {"find", method(calls_find), METH_FASTCALL, nullptr},
                               {"remember", method(calls_remember), METH_FASTCALL, nullptr},
                               {"clear", method(calls_clear), METH_NOARGS, nullptr},
                               {"values", method(calls_values), METH_NOARGS, nullptr},
                               {nullptr, nullptr, 0, nullptr}};
PyType_Slot calls_slots[] = {{Py_tp_new, reinterpret_cast<void*>(calls_new)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(calls_dealloc)},
                             {Py_tp_methods, calls_methods},
                             {0, nullptr}};
PyType_Spec calls_spec = {"medusa_kernels._fast_calls.Calls", sizeof(Calls), 0, Py_TPFLAGS_DEFAULT,
                          calls_slots};
PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_fast_calls", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fast_calls() {
    PyObject* module = PyModule_Create(&module_def);
    PyObject* type = module ? PyType_FromSpec(&calls_spec) : nullptr;
    if (!type || PyModule_AddObject(module, "Calls", type) != 0) {
        Py_XDECREF(type);
        Py_XDECREF(module);
        return nullptr;
    }
    return module;
}
