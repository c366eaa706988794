// finish_step on a GPU: a block a request.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "finish_step.h"

namespace medusa_kernels {
namespace {

constexpr int kThreads = 128;

template <typename Vector>
__device__ void copy_row(const FinishArgs& a, int b) {
    const auto* from = reinterpret_cast<const Vector*>(a.hidden + b * a.hidden_stride_b +
                                                       a.last_node[b] * a.hidden_stride_t);
    auto* to = reinterpret_cast<Vector*>(a.last_hidden + b * a.last_hidden_stride_b);
    for (int64_t i = threadIdx.x; i < a.row_bytes / int64_t(sizeof(Vector)); i += kThreads)
        to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads)
    finish_step_kernel(const __grid_constant__ FinishArgs a, bool wide) {
    const int b = blockIdx.x;
    const Finish finish(a, b);
    for (int column = threadIdx.x; column <= a.columns; column += kThreads)
        a.report[int64_t(b) * (a.columns + 1) + column] = finish.report(a, b, column);
    if (a.hidden && finish.goes_on) {
        if (wide) {
            copy_row<uint4>(a, b);
        } else {
            copy_row<uint8_t>(a, b);
        }
    }
    __syncthreads();  // every thread has read what is written now
    if (threadIdx.x == 0) finish.commit(a, b);
}

std::tuple<Tensor, Tensor> finish_step(Tensor accept_length, Tensor last_node, Tensor tokens,
                                       Tensor next_token, Tensor finished, Tensor max_tokens,
                                       Tensor root, std::optional<Tensor> eos_values,
                                       std::vector<int64_t> eos, std::optional<Tensor> hidden,
                                       std::optional<Tensor> last_hidden) {
    FinishArgs a{};
    const auto outputs = finish_args(a, accept_length, last_node, tokens, next_token, finished,
                                     max_tokens, root, eos_values, eos, hidden, last_hidden);
    if (a.batch == 0) return outputs;
    const int device = tokens.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const uint64_t bits = reinterpret_cast<uintptr_t>(a.hidden) |
                          reinterpret_cast<uintptr_t>(a.last_hidden) | a.row_bytes |
                          a.hidden_stride_b | a.hidden_stride_t | a.last_hidden_stride_b;
    finish_step_kernel<<<a.batch, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a,
                                                                                    bits % 16 == 0);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("finish_step", TORCH_BOX(&finish_step));
}

}  // namespace medusa_kernels
