"""What follows the model's pass over a tree, as one call: acceptance, compaction, and all that the next step needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _calls, _ops, acceptance
from ._checks import check_tensor
from .acceptance import Acceptance, AcceptMode, accept_candidates
from .kv_cache import compact_kv_cache
from .tree import TokenTree


class VerifiedStep(NamedTuple):
    """What `verify_step` returns; P = max_depth + 1 of the tree."""

    new_tokens: Tensor  # [B, P] int64, accepted tokens below the root, then the next root; -1 padded
    done: Tensor  # [B] bool, whether the request has ended, in this step or before
    report: Tensor  # [B, P + 1] int64, new_tokens and done side by side: all that a host has to fetch, in one copy
    accepted: Acceptance


def verify_step(
    logits: Tensor,
    tokens: Tensor,
    tree: TokenTree,
    kv: Tensor | Sequence[Sequence[Tensor]],
    cache_seqlens: Tensor,
    max_tokens: Tensor,
    root: Tensor,
    *,
    block_table: Tensor | None = None,
    hidden: Tensor | None = None,
    last_hidden: Tensor | None = None,
    mode: str | AcceptMode | Tensor = "greedy",
    temperature: float | Tensor = 1.0,
    posterior_threshold: float | Tensor = 0.09,
    posterior_alpha: float | Tensor = 0.3,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    out: VerifiedStep | None = None,
) -> VerifiedStep:
    """Accept a path of each request's tree, commit it to the KV cache, and leave all state ready for the next tree.

    logits, tokens, tree, mode ... eos_token_id:  as for `accept_candidates`
    kv, cache_seqlens, block_table:               as for `compact_kv_cache`; both changed in place

    Each request's state, changed in place, so that a captured CUDA graph can be replayed as it is:
    cache_seqlens:  [B] int32, committed tokens: the position of the next root; of its nodes, `+ depths`
    max_tokens:     [B] int32, tokens that the request may still have, the root of this tree counted: with a first root
                    decided by the prompt, the length of the answer. Becomes 0 when the request ends. 0 or less: the
                    request has ended
    root:           [B] int64, node 0 of the next tree; of a request that ends it stays, as the model needs some token
    last_hidden:    [B, hidden] what `hidden [B, T, hidden]` has at the node that predicted the next root, for drafters
                    that start from there (Medusa, EAGLE); given together, of equal dtype

    out:            an earlier call's result, or contiguous tensors like it, `new_tokens` a view of `report`, to be
                    written and returned. Such a call takes the host less time, unless `seed` is an int

    A request ends with an EOS, on the path or as its next root, or when `max_tokens` is used up: the next root is the
    last token then, and is not run through the model. Of one that has ended, or is padding in this step
    (`tree.num_nodes[b] == 0`), nothing changes, and its new tokens are all -1.

    Three launches on a GPU (acceptance, compaction, bookkeeping), no host synchronisation.

    Raises TypeError, ValueError for an argument of the wrong type, shape, dtype, device or stride, RuntimeError where
    the compiled operators are missing. Nothing but `out` is written then.
    """
    acceptance.check_tree(tree)
    known: object = None
    if not _calls.traced():
        tensors = (tokens, max_tokens, root, hidden, last_hidden, *(() if out is None else _outputs(out)))
        known = _checked.find(tensors, (tree.max_depth,))
    if known is None or not (out is None or _is_view(out)):
        _check_state(tokens, max_tokens, root, hidden, last_hidden)
        if out is not None:
            batch, columns = tokens.shape[0], tree.max_depth + 1
            _check_out(out, batch, columns, tokens.device)
            acceptance.check_out("out.accepted", out.accepted, batch, columns, tokens.device)
        if not _calls.traced():
            _checked.remember(tensors, (tree.max_depth,), _check_state)
    accepted = accept_candidates(
        logits, tokens, tree, mode=mode, temperature=temperature, posterior_threshold=posterior_threshold,
        posterior_alpha=posterior_alpha, top_k=top_k, top_p=top_p, seed=seed, eos_token_id=eos_token_id,
        max_tokens=max_tokens, out=None if out is None else out.accepted,
    )  # fmt: skip
    if torch.compiler.is_compiling() or not isinstance(seed, Tensor):
        compact_kv_cache(kv, accepted.path, accepted.accept_length, cache_seqlens, block_table=block_table)
    else:
        try:
            compact_kv_cache(kv, accepted.path, accepted.accept_length, cache_seqlens, block_table=block_table)
        except Exception:
            seed[1] -= 1  # as if the call had not been made
            raise
    return finish_step(accepted, max_tokens, root, eos_token_id, hidden, last_hidden, out)


_checked = _calls.new_calls()  # states and outputs of verify_step, which are found here and never called


def finish_step(
    accepted: Acceptance,
    max_tokens: Tensor,
    root: Tensor,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    hidden: Tensor | None = None,
    last_hidden: Tensor | None = None,
    out: VerifiedStep | None = None,
) -> VerifiedStep:
    """The last part of `verify_step`: budgets, next roots and new tokens of requests whose path has been accepted.

    Of `out` all but `accepted` is written; what is returned has that of this call.
    """
    eos_tensor, eos = acceptance._eos(eos_token_id)
    accept_length, _, last_node, tokens, next_token, finished = accepted
    arguments = (
        accept_length, last_node, tokens, next_token, finished, max_tokens, root, eos_tensor, eos, hidden, last_hidden,
    )  # fmt: skip
    if out is None:
        compiling = torch.compiler.is_compiling()
        op = torch.ops.medusa_kernels.finish_step if compiling else _ops.op("finish_step", max_tokens.is_cuda)
        report, done = op(*arguments)
        return VerifiedStep(report[:, :-1], done, report, accepted)
    new_tokens, done, report, before = _verified_step(out)
    tensors = (
        accept_length, last_node, tokens, next_token, finished, max_tokens, root, eos_tensor, hidden, last_hidden,
        report, done, new_tokens,
    )  # fmt: skip
    options = tuple(eos)
    if _calls.traced() or not _is_view(out) or not _known.call(tensors, options):
        try:
            launch = None
            if _calls.are_plain(tensors):
                launch = _calls.planned("finish_step", arguments, max_tokens.device)
            _check_out(out, tokens.shape[0], tokens.shape[1], tokens.device)
            if launch is None:
                for result, value in zip((report, done), torch.ops.medusa_kernels.finish_step(*arguments)):
                    result.copy_(value)
                new_tokens = report[:, :-1]
            else:
                launch(_calls.addresses(tensors))
                _known.remember(tensors, options, launch)
        except RuntimeError as error:
            _ops.reraise(error)
    return out if before is accepted else VerifiedStep(new_tokens, done, report, accepted)


_known = _calls.new_calls()


def _verified_step(out: object) -> VerifiedStep:
    if not isinstance(out, VerifiedStep):
        raise TypeError(f"out: expected a VerifiedStep, got {type(out).__name__}")
    return out


def _outputs(out: object) -> tuple[Tensor, ...]:
    new_tokens, done, report, accepted = _verified_step(out)
    return new_tokens, done, report, *acceptance.check_type("out.accepted", accepted)


def _is_view(out: VerifiedStep) -> bool:
    """Whether `new_tokens` and `report` begin at the same address."""
    try:
        return out.new_tokens.data_ptr() == out.report.data_ptr()
    except (AttributeError, RuntimeError):  # not what they should be: the check says it
        return False


def _check_out(out: VerifiedStep, batch: int, columns: int, device: torch.device) -> None:
    """Raise if `out` cannot be written to, but for its `accepted`; columns: its P."""
    new_tokens, done, report, _ = out
    check_tensor("out.report", report, shape=(batch, columns + 1), dtype=torch.int64, device=device, contiguous=True)
    check_tensor("out.done", done, shape=(batch,), dtype=torch.bool, device=device, contiguous=True)
    check_tensor("out.new_tokens", new_tokens, shape=(batch, columns), dtype=torch.int64, device=device)
    if not _calls.traced() and not (_is_view(out) and new_tokens.stride() == report.stride()):
        raise ValueError("out.new_tokens: expected report[:, :-1], a view of it, got other memory")


def _check_state(tokens, max_tokens, root, hidden, last_hidden) -> None:
    check_tensor("tokens", tokens, shape=(None, None), dtype=torch.int64)
    batch, size = tokens.shape
    each = {"shape": (batch,), "device": tokens.device, "last_dim_contiguous": True}
    check_tensor("max_tokens", max_tokens, dtype=torch.int32, **each)
    check_tensor("root", root, dtype=torch.int64, **each)
    if (hidden is None) != (last_hidden is None):
        name = "hidden" if hidden is None else "last_hidden"
        raise ValueError(f"{name}: hidden and last_hidden must be given together, got None")
    if hidden is not None:
        check_tensor("hidden", hidden, shape=(batch, size, None), device=tokens.device, last_dim_contiguous=True)
        shape = (batch, hidden.shape[2])
        check_tensor("last_hidden", last_hidden, shape=shape, dtype=hidden.dtype, device=tokens.device,
                     last_dim_contiguous=True)  # fmt: skip
