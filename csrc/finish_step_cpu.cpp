// finish_step on the CPU.
#include <torch/csrc/stable/library.h>

#include "finish_step.h"

namespace medusa_kernels {
namespace {

std::tuple<Tensor, Tensor> finish_step(Tensor accept_length, Tensor last_node, Tensor tokens,
                                       Tensor next_token, Tensor finished, Tensor max_tokens,
                                       Tensor root, std::optional<Tensor> eos_values,
                                       std::vector<int64_t> eos, std::optional<Tensor> hidden,
                                       std::optional<Tensor> last_hidden) {
    FinishArgs a = finish_args(accept_length, last_node, tokens, next_token, finished, max_tokens,
                               root, eos_values, eos, hidden, last_hidden);
    const auto outputs = finish_outputs(a, tokens);
    finish_serially(a);
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CPU, m) {
    m.impl("finish_step", TORCH_BOX(&finish_step));
    m.impl("finish_step_plan", TORCH_BOX(&finish_step_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_finish_step(const void* plan, const uint64_t* addresses,
                                                void*) {
    using namespace medusa_kernels;
    return error_of([&] {
        const auto& planned = *static_cast<const FinishPlan*>(plan);
        FinishArgs a = planned.a;
        set_addresses(a, Addresses(addresses));
        finish_serially(a);
    });
}
