"""The bookkeeping after acceptance, of all requests in one launch: a program a request."""

import torch
import triton
import triton.language as tl


@triton.jit
def finish_step_kernel(
    accept_length_ptr, last_node_ptr,  # [B] int32
    tokens_ptr,  # [B, P] int64, of the accepted path
    next_token_ptr,  # [B] int64
    finished_ptr,  # [B] bool
    max_tokens_ptr, root_ptr,  # [B] int32, [B] int64; in place
    eos_ptr,  # [num_eos] int64
    hidden_ptr, last_hidden_ptr,  # [B, T, hidden_size], [B, hidden_size]; the second in place
    report_ptr, done_ptr,  # [B, P + 1] int64, [B] bool
    columns, num_eos, hidden_size, stride_hb, stride_ht, stride_lb,
    EOS: tl.constexpr, BLOCK_EOS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accept_length_ptr + batch)
    last_node = tl.load(last_node_ptr + batch)
    next_token = tl.load(next_token_ptr + batch)
    budget = tl.load(max_tokens_ptr + batch)
    takes_part = accepted >= 0
    goes_on = takes_part & (next_token >= 0)

    ends = tl.load(finished_ptr + batch) != 0
    for i in tl.static_range(len(EOS)):
        ends |= next_token == EOS[i]
    if BLOCK_EOS > 0:
        offs = tl.arange(0, BLOCK_EOS)
        eos = tl.load(eos_ptr + offs, mask=offs < num_eos, other=-1)
        ends |= tl.max((eos == next_token).to(tl.int32) * (offs < num_eos), 0) > 0
    left = budget - accepted - 1
    done = tl.where(takes_part, ends | (left <= 1), budget <= 0)
    tl.store(max_tokens_ptr + batch, tl.where(done, 0, left), mask=takes_part)
    tl.store(root_ptr + batch, next_token, mask=goes_on)
    tl.store(done_ptr + batch, done)

    column = tl.arange(0, BLOCK_P)
    tokens = tl.load(tokens_ptr + batch * columns + column + 1, mask=column < accepted, other=-1)
    tokens = tl.where((column == accepted) & goes_on, next_token, tokens)
    tokens = tl.where(column == columns, done.to(tl.int64), tokens)
    tl.store(report_ptr + batch * (columns + 1) + column, tokens, mask=column <= columns)

    if BLOCK_H > 0:
        source = hidden_ptr + batch * stride_hb + last_node.to(tl.int64) * stride_ht
        for start in range(0, hidden_size, BLOCK_H):
            dims = start + tl.arange(0, BLOCK_H)
            mask = goes_on & (dims < hidden_size)
            tl.store(last_hidden_ptr + batch * stride_lb + dims, tl.load(source + dims, mask=mask), mask=mask)


def finish_step(
    accept_length, last_node, tokens, next_token, finished, max_tokens, root, eos_tensor, eos, hidden, last_hidden
):
    """Launch on checked arguments; returns report and done."""
    batch, columns = tokens.shape
    report = torch.empty((batch, columns + 1), dtype=torch.int64, device=tokens.device)
    done = torch.empty_like(finished)
    if batch == 0:
        return report, done
    num_eos = 0 if eos_tensor is None else eos_tensor.shape[0]
    hidden_size = 0 if hidden is None else hidden.shape[2]
    finish_step_kernel[(batch,)](
        accept_length, last_node, tokens, next_token, finished, max_tokens, root, eos_tensor, hidden, last_hidden,
        report, done, columns, num_eos, hidden_size,
        *((0, 0, 0) if hidden is None else (hidden.stride(0), hidden.stride(1), last_hidden.stride(0))),
        EOS=tuple(eos), BLOCK_EOS=triton.next_power_of_2(num_eos) if num_eos else 0,
        BLOCK_P=triton.next_power_of_2(columns + 1),
        BLOCK_H=min(triton.next_power_of_2(hidden_size), 2048) if hidden_size else 0,
        num_warps=4,
    )  # fmt: skip
    return report, done
