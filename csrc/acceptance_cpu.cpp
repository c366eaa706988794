// accept_candidates on the CPU: requests in parallel, each by the serial walk of acceptance.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "acceptance_args.h"

namespace medusa_kernels {
namespace {

void accept(const AcceptArgs& a, ScalarType type) {
    const uint64_t key = a.generator ? a.generator[0] : static_cast<uint64_t>(a.seed);
    const uint64_t offset = a.generator ? a.generator[1] & kOffsetMask : 0;
    torch::stable::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            switch (type) {
                case ScalarType::Half:
                    SerialAcceptance<fp16_t>(a, b, key, offset).run();
                    break;
                case ScalarType::BFloat16:
                    SerialAcceptance<bf16_t>(a, b, key, offset).run();
                    break;
                default:
                    SerialAcceptance<float>(a, b, key, offset).run();
            }
        }
    });
    if (a.generator && a.batch > 0) a.generator[1] = (offset + 1) & kOffsetMask;
}

Outputs accept_candidates(Tensor logits, Tensor tokens, Tensor parents,
                          std::optional<Tensor> num_nodes, int64_t max_depth,
                          std::vector<double> numbers, std::optional<std::vector<Tensor>> values,
                          std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                          std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                          std::optional<Tensor> generator, std::optional<int64_t> seed,
                          bool share_storage) {
    AcceptArgs a = accept_args(logits, tokens, parents, num_nodes, max_depth, numbers, values,
                               max_tokens_values, max_tokens, eos_values, eos, generator, seed);
    const Outputs outputs = accept_outputs(a, logits, share_storage);
    accept(a, logits.scalar_type());
    return outputs;
}

struct AcceptPlan {
    AcceptArgs a;
    ScalarType type;
};

Tensor accept_candidates_plan(Tensor logits, Tensor tokens, Tensor parents,
                              std::optional<Tensor> num_nodes, int64_t max_depth,
                              std::vector<double> numbers,
                              std::optional<std::vector<Tensor>> values,
                              std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                              std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                              std::optional<Tensor> generator, std::optional<int64_t> seed) {
    return plan_tensor(
        AcceptPlan{accept_args(logits, tokens, parents, num_nodes, max_depth, numbers, values,
                               max_tokens_values, max_tokens, eos_values, eos, generator, seed),
                   logits.scalar_type()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CPU, m) {
    m.impl("accept_candidates", TORCH_BOX(&accept_candidates));
    m.impl("accept_candidates_plan", TORCH_BOX(&accept_candidates_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_accept_candidates(const void* plan, const uint64_t* addresses,
                                                      void*) {
    using namespace medusa_kernels;
    return error_of([&] {
        const auto& planned = *static_cast<const AcceptPlan*>(plan);
        AcceptArgs a = planned.a;
        set_addresses(a, Addresses(addresses));
        accept(a, planned.type);
    });
}
