// The bookkeeping after acceptance, for its CPU and its CUDA kernel, and its checked arguments.
#pragma once

#include <cstring>

#include "acceptance_args.h"

namespace medusa_kernels {

struct FinishArgs {
    int32_t batch, columns;
    const int32_t *accept_length, *last_node;  // [batch]
    const int64_t *tokens, *next_token;        // [batch, columns], of the accepted path; [batch]
    const bool* finished;                      // [batch]
    int32_t* max_tokens;                       // [batch], in place
    int64_t* root;                             // [batch], in place
    const int64_t* eos;                        // [num_eos], or nullptr: those by value
    int32_t num_eos;
    int64_t eos_value[kMaxEos];
    const char* hidden;  // [batch, nodes, row_bytes] or nullptr; strides in bytes
    char* last_hidden;   // [batch, row_bytes], in place
    int64_t row_bytes, hidden_stride_b, hidden_stride_t, last_hidden_stride_b;
    int64_t* report;  // [batch, columns + 1]
    bool* done;       // [batch]
};

struct Finish {
    int32_t accepted, left;  // nodes below the root; tokens that it may still have
    int64_t next_token;
    bool takes_part, goes_on, done;

    MK_HD Finish(const FinishArgs& a, int b)
        : accepted(a.accept_length[b]),
          next_token(a.next_token[b]),
          takes_part(accepted >= 0),
          goes_on(takes_part && next_token >= 0) {
        bool ends = a.finished[b];
        for (int i = 0; i < a.num_eos; ++i)
            ends = ends || next_token == (a.eos ? a.eos[i] : a.eos_value[i]);
        left = a.max_tokens[b] - (takes_part ? accepted + 1 : 0);
        done = takes_part ? ends || left <= 1 : left <= 0;
        if (done) left = 0;
    }

    // New tokens, then whether the request has ended.
    MK_HD int64_t report(const FinishArgs& a, int b, int column) const {
        if (column == a.columns) return done;
        if (column < accepted) return a.tokens[int64_t(b) * a.columns + column + 1];
        return column == accepted && goes_on ? next_token : -1;
    }

    MK_HD void commit(const FinishArgs& a, int b) const {
        if (takes_part) a.max_tokens[b] = left;
        if (goes_on) a.root[b] = next_token;
        a.done[b] = done;
    }
};

// The CPU kernel.
inline void finish_serially(const FinishArgs& a) {
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
}

inline FinishArgs finish_args(const Tensor& accept_length, const Tensor& last_node,
                              const Tensor& tokens, const Tensor& next_token,
                              const Tensor& finished, const Tensor& max_tokens, const Tensor& root,
                              const std::optional<Tensor>& eos_values,
                              const std::vector<int64_t>& eos, const std::optional<Tensor>& hidden,
                              const std::optional<Tensor>& last_hidden) {
    FinishArgs a{};
    MK_CHECK_VALUE(tokens.dim() == 2 && tokens.is_contiguous() && tokens.size(1) >= 1,
                   "tokens: expected a contiguous tensor of 2 dimensions");
    const int64_t batch = tokens.size(0), columns = tokens.size(1);
    const auto each = [&](const char* name, const Tensor& x, ScalarType type, const char* type_name,
                          auto*& pointer) {
        check_argument(name, x, tokens, type, type_name, {batch});
        pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(x.data_ptr());
    };
    a.batch = static_cast<int32_t>(batch);
    a.columns = static_cast<int32_t>(columns);
    each("accept_length", accept_length, ScalarType::Int, "torch.int32", a.accept_length);
    each("last_node", last_node, ScalarType::Int, "torch.int32", a.last_node);
    check_argument("tokens", tokens, tokens, ScalarType::Long, "torch.int64", {batch, columns});
    a.tokens = static_cast<const int64_t*>(tokens.data_ptr());
    each("next_token", next_token, ScalarType::Long, "torch.int64", a.next_token);
    each("finished", finished, ScalarType::Bool, "torch.bool", a.finished);
    each("max_tokens", max_tokens, ScalarType::Int, "torch.int32", a.max_tokens);
    each("root", root, ScalarType::Long, "torch.int64", a.root);
    take_eos(a, eos_values, eos, tokens);
    MK_CHECK_VALUE(hidden.has_value() == last_hidden.has_value(),
                   "hidden: hidden and last_hidden must be given together");
    if (hidden) {
        MK_CHECK_VALUE(hidden->dim() == 3, "hidden: expected 3 dimensions, got ", hidden->dim());
        const int64_t element = static_cast<int64_t>(hidden->element_size());
        check_argument("hidden", *hidden, tokens, hidden->scalar_type(), "",
                       {batch, hidden->size(1), hidden->size(2)});
        check_argument("last_hidden", *last_hidden, tokens, hidden->scalar_type(),
                       "the dtype of hidden", {batch, hidden->size(2)});
        a.hidden = static_cast<const char*>(hidden->data_ptr());
        a.last_hidden = static_cast<char*>(last_hidden->data_ptr());
        a.row_bytes = hidden->size(2) * element;
        a.hidden_stride_b = hidden->stride(0) * element;
        a.hidden_stride_t = hidden->stride(1) * element;
        a.last_hidden_stride_b = last_hidden->stride(0) * element;
    }
    return a;
}

// report, done
inline std::tuple<Tensor, Tensor> finish_outputs(FinishArgs& a, const Tensor& tokens) {
    Tensor report = new_tensor(tokens, ScalarType::Long, a.batch, a.columns + 1);
    Tensor done = new_tensor(tokens, ScalarType::Bool, a.batch);
    a.report = static_cast<int64_t*>(report.data_ptr());
    a.done = static_cast<bool*>(done.data_ptr());
    return {report, done};
}

// All of a call but its addresses.
struct FinishPlan {
    FinishArgs a;
    int32_t device;
};

// The operator.
inline Tensor finish_step_plan(Tensor accept_length, Tensor last_node, Tensor tokens,
                               Tensor next_token, Tensor finished, Tensor max_tokens, Tensor root,
                               std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                               std::optional<Tensor> hidden, std::optional<Tensor> last_hidden) {
    const FinishArgs a = finish_args(accept_length, last_node, tokens, next_token, finished,
                                     max_tokens, root, eos_values, eos, hidden, last_hidden);
    return plan_tensor(FinishPlan{a, tokens.get_device_index()});
}

// Of a call made again, in the order in which medusa_kernels/verify.py has its tensors.
inline void set_addresses(FinishArgs& a, Addresses next) {
    next(a.accept_length);
    next(a.last_node);
    next(a.tokens);
    next(a.next_token);
    next(a.finished);
    next(a.max_tokens);
    next(a.root);
    next(a.eos);
    next(a.hidden);
    next(a.last_hidden);
    next(a.report);
    next(a.done);
}

}  // namespace medusa_kernels
