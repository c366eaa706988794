// finish_step on the GPU: how its kernel is launched.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "early_launch.h"
#include "finish_step.h"
#include "finish_step_kernel.h"

namespace medusa_kernels {
namespace {

using namespace gpu;

void launch(const FinishArgs& a, cudaStream_t stream) {
    launch_early(finish_step_kernel, dim3(a.batch), dim3(kThreads), stream, a, has_wide_rows(a));
}

std::tuple<Tensor, Tensor> finish_step(Tensor accept_length, Tensor last_node, Tensor tokens,
                                       Tensor next_token, Tensor finished, Tensor max_tokens,
                                       Tensor root, std::optional<Tensor> eos_values,
                                       std::vector<int64_t> eos, std::optional<Tensor> hidden,
                                       std::optional<Tensor> last_hidden) {
    FinishArgs a = finish_args(accept_length, last_node, tokens, next_token, finished, max_tokens,
                               root, eos_values, eos, hidden, last_hidden);
    const auto outputs = finish_outputs(a, tokens);
    if (a.batch == 0) return outputs;
    const int device = tokens.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    launch(a, static_cast<cudaStream_t>(stream));
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("finish_step", TORCH_BOX(&finish_step));
    m.impl("finish_step_plan", TORCH_BOX(&finish_step_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_finish_step(const void* plan, const uint64_t* addresses,
                                                void* stream) {
    using namespace medusa_kernels;
    return error_of([&] {
        const auto& planned = *static_cast<const FinishPlan*>(plan);
        if (planned.a.batch == 0) return;
        FinishArgs a = planned.a;
        set_addresses(a, Addresses(addresses));
        on_device(planned.device, [&] { launch(a, static_cast<cudaStream_t>(stream)); });
    });
}
