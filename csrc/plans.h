// Calls made again (medusa_kernels/_calls.py): a plan is all of a checked call but the addresses of
// its tensors. An operator gives it as bytes in a tensor, which Python keeps; a function outside
// the dispatcher makes the call from it, at other addresses.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#endif

// Of such a function: const char* name(const void* plan, const uint64_t* addresses, void* stream),
// which returns what went wrong, or null.
#define MK_MAKES_CALLS_AGAIN extern "C" __attribute__((visibility("default"))) const char*

namespace medusa_kernels {

inline torch::stable::Tensor plan_tensor(const void* bytes, size_t count) {
    const int64_t size = static_cast<int64_t>(count), stride = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
    torch::stable::Tensor plan(handle);
    std::memcpy(plan.data_ptr(), bytes, count);
    return plan;
}

template <typename Plan>
torch::stable::Tensor plan_tensor(const Plan& plan) {
    static_assert(std::is_trivially_copyable_v<Plan>);
    return plan_tensor(&plan, sizeof plan);
}

// Hands out a call's addresses in turn.
class Addresses {
 public:
    explicit Addresses(const uint64_t* next) : next_(next) {}
    template <typename T>
    void operator()(T*& pointer) {
        pointer = reinterpret_cast<T*>(*next_++);
    }

 private:
    const uint64_t* next_;
};

// What went wrong in `call`, or null.
template <typename Call>
const char* error_of(Call&& call) {
    static thread_local std::string error;
    try {
        call();
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

#if defined(__CUDACC__)
// With this device current. A guard takes longer than to see that it is.
template <typename Call>
void on_device(int device, Call&& call) {
    int current;
    STD_CUDA_CHECK(cudaGetDevice(&current));
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (current != device) guard.emplace(device);
    call();
}
#endif

}  // namespace medusa_kernels
