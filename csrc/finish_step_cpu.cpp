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
    FinishArgs a{};
    const auto outputs = finish_args(a, accept_length, last_node, tokens, next_token, finished,
                                     max_tokens, root, eos_values, eos, hidden, last_hidden);
    for (int b = 0; b < a.batch; ++b) {
        const Finish finish(a, b);
        for (int column = 0; column <= a.columns; ++column)
            a.report[int64_t(b) * (a.columns + 1) + column] = finish.report(a, b, column);
        if (a.hidden && finish.goes_on) {
            std::memcpy(a.last_hidden + b * a.last_hidden_stride_b,
                        a.hidden + b * a.hidden_stride_b + a.last_node[b] * a.hidden_stride_t,
                        a.row_bytes);
        }
        finish.commit(a, b);
    }
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CPU, m) {
    m.impl("finish_step", TORCH_BOX(&finish_step));
}

}  // namespace medusa_kernels
