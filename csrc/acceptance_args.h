// The checked arguments of accept_candidates and its outputs, for its CPU and its CUDA kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "acceptance.h"
#include "checks.h"
#include "plans.h"

namespace medusa_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// accept_length, path, last_node, tokens, next_token, finished
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// In a storage of its own, or in that of `pool` from byte `offset` on.
inline Tensor new_tensor(const Tensor& like, ScalarType type, int64_t rows, int64_t columns = 0,
                         const Tensor* pool = nullptr, int64_t offset = 0) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns ? columns : 1, 1};
    const int64_t dim = columns ? 2 : 1;
    const int32_t dtype = type == ScalarType::Int    ? aoti_torch_dtype_int32()
                          : type == ScalarType::Long ? aoti_torch_dtype_int64()
                          : type == ScalarType::Byte ? aoti_torch_dtype_uint8()
                                                     : aoti_torch_dtype_bool();
    AtenTensorHandle handle;
    if (pool) {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch__alloc_from_pool(pool->get(), offset, dtype, dim, sizes, strides, &handle));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
            dim, sizes, strides, dtype,
            like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
            like.get_device_index(), &handle));
    }
    return Tensor(handle);
}

inline void check_argument(const char* name, const Tensor& x, const Tensor& logits, ScalarType type,
                           const char* type_name, std::initializer_list<int64_t> shape) {
    MK_CHECK_VALUE(x.scalar_type() == type, name, ": expected ", type_name);
    bool same = x.dim() == static_cast<int64_t>(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) same = same && x.size(d++) == size;
    if (!same) {
        std::ostringstream want, got;
        for (const int64_t size : shape) want << (want.tellp() ? ", " : "") << size;
        for (int64_t i = 0; i < x.dim(); ++i) got << (i ? ", " : "") << x.size(i);
        value_error(name, ": expected shape [", want.str(), "], got [", got.str(), "]");
    }
    MK_CHECK_VALUE(x.is_cuda() == logits.is_cuda() && x.is_cpu() == logits.is_cpu() &&
                       x.get_device_index() == logits.get_device_index(),
                   name, ": expected a tensor on the device of logits");
    const int64_t last = x.dim() - 1;
    MK_CHECK_VALUE(x.size(last) <= 1 || x.stride(last) == 1, name,
                   ": the last dimension must be contiguous");
}

template <typename T>
PerRequest<T> per_request(const char* name, const std::optional<Tensor>& values, T value,
                          const Tensor& logits, ScalarType type, const char* type_name) {
    if (!values) return {nullptr, value};
    check_argument(name, *values, logits, type, type_name, {logits.size(0)});
    return {static_cast<const T*>(values->data_ptr()), value};
}

template <typename Args>
void take_eos(Args& a, const std::optional<Tensor>& eos_values, const std::vector<int64_t>& eos,
              const Tensor& logits) {
    if (eos_values) {
        MK_CHECK_VALUE(eos_values->dim() == 1, "eos_token_id: expected shape [n], got ",
                       eos_values->dim(), " dimensions");
        check_argument("eos_token_id", *eos_values, logits, ScalarType::Long, "torch.int64",
                       {eos_values->size(0)});
        a.eos = static_cast<const int64_t*>(eos_values->data_ptr());
        a.num_eos = static_cast<int32_t>(eos_values->size(0));
    } else {
        MK_CHECK_VALUE(eos.size() <= kMaxEos, "eos_token_id: at most ", kMaxEos,
                       " as integers, got ", eos.size(), ": pass a tensor");
        a.num_eos = static_cast<int32_t>(eos.size());
        for (size_t i = 0; i < eos.size(); ++i) a.eos_value[i] = eos[i];
    }
}

// With `share_storage` in one allocation: six of them, and six frees, take the host longer than the
// launch. An operator in a compiler's graph may not do so.
inline Outputs accept_outputs(AcceptArgs& a, const Tensor& logits, bool share_storage) {
    const int64_t columns = a.max_depth + 1,
                  bytes = (a.batch * columns + 1) / 2 * 16;  // of each, at most: aligned to 16
    std::optional<Tensor> pool;
    if (share_storage) pool = new_tensor(logits, ScalarType::Byte, 6 * bytes);
    int64_t offset = 0;
    const auto take = [&](ScalarType type, int64_t columns, auto*& pointer) {
        const Tensor x =
            new_tensor(logits, type, a.batch, columns, pool ? &*pool : nullptr, offset);
        pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(x.data_ptr());
        offset += bytes;
        return x;
    };
    return {
        take(ScalarType::Int, 0, a.accept_length), take(ScalarType::Int, columns, a.path),
        take(ScalarType::Int, 0, a.last_node),     take(ScalarType::Long, columns, a.out_tokens),
        take(ScalarType::Long, 0, a.next_token),   take(ScalarType::Bool, 0, a.finished)};
}

// numbers: mode, temperature, posterior_threshold, posterior_alpha, top_k, top_p of all requests;
// -1: each has its own in the next of `values`.
inline AcceptArgs accept_args(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                              const std::optional<Tensor>& num_nodes, int64_t max_depth,
                              const std::vector<double>& numbers,
                              const std::optional<std::vector<Tensor>>& values,
                              const std::optional<Tensor>& max_tokens_values, int64_t max_tokens,
                              const std::optional<Tensor>& eos_values,
                              const std::vector<int64_t>& eos,
                              const std::optional<Tensor>& generator, std::optional<int64_t> seed) {
    const ScalarType type = logits.scalar_type();
    MK_CHECK_VALUE(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "logits: expected torch.float16, torch.bfloat16 or torch.float32");
    MK_CHECK_VALUE(logits.dim() == 3,
                   "logits: expected 3 dimensions [batch, nodes, vocabulary], got ", logits.dim());
    const int64_t batch = logits.size(0), size = logits.size(1), vocab = logits.size(2);
    MK_CHECK_VALUE(batch <= 65535, "logits: at most 65535 requests, got ", batch);
    MK_CHECK_VALUE(vocab >= 1 && vocab < 1 << 24,
                   "logits: expected a vocabulary of 1 to 2**24 - 1, got ", vocab);
    MK_CHECK_VALUE(vocab == 1 || logits.stride(2) == 1,
                   "logits: the last dimension must be contiguous, got stride ", logits.stride(2));
    const bool batched = parents.dim() == 2;
    const int64_t tree_size = parents.dim() > 0 ? parents.size(parents.dim() - 1) : 0;
    MK_CHECK_VALUE(tree_size >= 1 && tree_size <= kMaxTreeNodes, "tree: expected 1..",
                   kMaxTreeNodes, " nodes, got ", tree_size);
    MK_CHECK_VALUE(size == tree_size, "logits: expected rows for the ", tree_size,
                   " nodes of the tree, got ", size);
    check_argument("tokens", tokens, logits, ScalarType::Long, "torch.int64", {batch, size});
    if (batched) {
        check_argument("tree", parents, logits, ScalarType::Int, "torch.int32 parents",
                       {batch, size});
    } else {
        check_argument("tree", parents, logits, ScalarType::Int, "torch.int32 parents", {size});
    }
    MK_CHECK_VALUE(max_depth >= 0 && max_depth < size, "tree: expected a max_depth in 0..",
                   size - 1, ", got ", max_depth);

    AcceptArgs a{};
    a.logits = logits.data_ptr();
    a.logits_stride_b = logits.stride(0);
    a.logits_stride_t = logits.stride(1);
    a.tokens = static_cast<const int64_t*>(tokens.data_ptr());
    a.tokens_stride_b = tokens.stride(0);
    a.parents = static_cast<const int32_t*>(parents.data_ptr());
    a.parents_stride_b = batched ? parents.stride(0) : 0;
    a.num_nodes =
        per_request<int32_t>("tree.num_nodes", num_nodes, 0, logits, ScalarType::Int, "torch.int32")
            .values;
    a.max_tokens = per_request("max_tokens", max_tokens_values, static_cast<int32_t>(max_tokens),
                               logits, ScalarType::Int, "torch.int32");
    a.batch = static_cast<int32_t>(batch);
    a.size = static_cast<int32_t>(size);
    a.vocab = static_cast<int32_t>(vocab);
    a.max_depth = static_cast<int32_t>(max_depth);
    MK_CHECK_VALUE(numbers.size() == 6, "numbers: expected 6, got ", numbers.size());
    size_t number = 0, value = 0;
    const auto option = [&](const char* name, auto& result, ScalarType dtype,
                            const char* dtype_name) {
        const double x = numbers[number++];
        if (x == -1.0) {
            MK_CHECK_VALUE(values && value < values->size(), name, ": expected a tensor in values");
            check_argument(name, (*values)[value], logits, dtype, dtype_name, {batch});
            result.values = static_cast<decltype(result.values)>((*values)[value++].data_ptr());
        } else {
            result.value = static_cast<decltype(result.value)>(x);
        }
    };
    option("mode", a.mode, ScalarType::Char, "torch.int8");
    option("temperature", a.temperature, ScalarType::Float, "torch.float32");
    option("posterior_threshold", a.threshold, ScalarType::Float, "torch.float32");
    option("posterior_alpha", a.alpha, ScalarType::Float, "torch.float32");
    option("top_k", a.top_k, ScalarType::Int, "torch.int32");
    option("top_p", a.top_p, ScalarType::Float, "torch.float32");
    take_eos(a, eos_values, eos, logits);
    a.has_seed = generator.has_value() || seed.has_value();
    a.seed = seed.value_or(0);
    if (generator) {
        check_argument("seed", *generator, logits, ScalarType::Long, "torch.int64", {2});
        a.generator = static_cast<uint64_t*>(generator->data_ptr());
    }
    MK_CHECK_VALUE(a.has_seed || a.mode.values || a.mode.value != kSampling,
                   "seed: mode \"sampling\" needs one, got None");
    return a;
}

// Of a call made again, in the order in which medusa_kernels/acceptance.py has its tensors. Only
// those options that each request has for itself have one.
inline void set_addresses(AcceptArgs& a, Addresses next) {
    next(a.logits);
    next(a.tokens);
    next(a.parents);
    next(a.num_nodes);
    next(a.max_tokens.values);
    next(a.eos);
    next(a.generator);
    next(a.accept_length);
    next(a.path);
    next(a.last_node);
    next(a.out_tokens);
    next(a.next_token);
    next(a.finished);
    const auto option = [&](auto& x) {
        if (x.values) next(x.values);
    };
    option(a.mode);
    option(a.temperature);
    option(a.threshold);
    option(a.alpha);
    option(a.top_k);
    option(a.top_p);
}

}  // namespace medusa_kernels
