"""Acceptance of a path of a draft tree, straight from the model's logits."""

import operator
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _calls, _ops
from ._checks import check_tensor
from .tree import TokenTree


class AcceptMode(IntEnum):
    """Values of `accept_candidates`' `mode` where it is a tensor."""

    GREEDY = 0
    TYPICAL = 1
    SAMPLING = 2


class Acceptance(NamedTuple):
    """What `accept_candidates` returns; P = max_depth + 1 of the tree."""

    accept_length: Tensor  # [B] int32, accepted nodes below the root; -1 where nothing is emitted
    path: Tensor  # [B, P] int32, nodes from the root on, -1 padded
    last_node: Tensor  # [B] int32, the path's end, -1 where nothing is emitted
    tokens: Tensor  # [B, P] int64, tokens of the path, -1 padded
    next_token: Tensor  # [B] int64, what comes after the path, the next tree's root; -1 where finished
    finished: Tensor  # [B] bool


_DTYPES = (torch.int32, torch.int32, torch.int32, torch.int64, torch.int64, torch.bool)
_MODES: dict[object, float] = {key: float(m) for m in AcceptMode for key in (m.name.lower(), m)}
_SAMPLING = float(AcceptMode.SAMPLING)
_NO_LIMIT = 2**31 - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max


def accept_candidates(
    logits: Tensor,
    tokens: Tensor,
    tree: TokenTree,
    *,
    mode: str | AcceptMode | Tensor = "greedy",
    temperature: float | Tensor = 1.0,
    posterior_threshold: float | Tensor = 0.09,
    posterior_alpha: float | Tensor = 0.3,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    max_tokens: int | Tensor | None = None,
    out: Acceptance | None = None,
) -> Acceptance:
    """The path of each request's tree that the model accepts, and the token after it.

    logits:        [B, T, V] fp16, bf16 or fp32, of every node; any strides, last dimension contiguous; V < 2**24
    tokens:        [B, T] int64, of every node, the root's included; one outside the vocabulary is never accepted
    tree:          T nodes, one tree or one a request. Nodes from `num_nodes[b]` on, and deeper than `max_depth`, are
                   never accepted; `num_nodes[b] == 0` is a padded request, for which nothing is emitted

    Each of these is one value, or a [B] tensor that gives each request its own:
    mode:          "greedy", "typical", "sampling"; tensor: int8 of `AcceptMode`
    temperature:   >= 0; 0 makes a request greedy whatever its mode. Tensors of this and the next two: float32
    posterior_threshold, posterior_alpha: of typical acceptance, >= 0
    top_k:         sampling: tokens with fewer than k greater logits are kept; None, in a tensor (int32) 0: all
    top_p:         sampling: tokens are kept while more probable ones, after top_k, weigh less than it. In (0, 1]
    max_tokens:    tokens that may be emitted now, the root included, `next_token` not; tensor: int32. The path is cut
                   to it, and a path that reaches it is finished. 0 or less: nothing is emitted, as for a padded request

    seed:          needed for sampling (without it a request that a mode tensor wants sampled is greedy); with it
                   typical acceptance draws its `next_token`. An int: draws are a function of it alone. A [2] int64
                   tensor (seed, offset), 0 <= offset < 2**40: the call adds 1 to the offset in place, so that a
                   replayed CUDA graph draws anew
    eos_token_id:  an int, up to 16 ints, or an [n] int64 tensor. The path ends with the first of them (the root may be
                   one), which stays in it, and the request is finished
    out:           an earlier call's result, or contiguous tensors like it: written and returned. Such a call takes the
                   host less time, unless `seed` is an int

    Greedy: a child is accepted iff its parent is and its token is the argmax of its parent's logits. The longest path;
    of equal ones that with the lower node where they part (siblings of equal token). `next_token`: argmax at its end.

    Typical (Medusa section 2.3.1): with p = softmax(parent's logits / temperature), h = -sum p ln(p + 1e-5), a child is
    accepted iff its parent is and p[token] > min(posterior_threshold, posterior_alpha exp(-h)). The longest path; then
    the highest sum of ln p; then the lowest node at its end. `next_token`: argmax; with a seed, drawn from the tokens
    that pass the same test.

    Sampling: what is emitted is distributed as by plain sampling with this temperature, top_k and top_p. At a node one
    uniform number decides among its children, each taking as much of [0, 1) as its token is probable (the second
    sibling of equal token nothing), or else the path ends and `next_token` is drawn from the other tokens. This is
    SpecInfer's (arXiv 2305.09781) recursive rejection for drafts that are not themselves drawn. Probabilities are
    multiples of 2**-31 of the row's greatest: what is below half of that is 0, and never emitted.

    NaN is never the argmax, which is the lowest index where equal; a row of NaN accepts nothing, and its argmax counts
    as 0. Rows with NaN or +inf, or nothing above -inf, have no softmax: typical acceptance and sampling accept nothing
    there, and `next_token` is the argmax.

    Everything is computed from weights that are integers, so results are the same from run to run and on CPU and GPU.
    No host synchronisation; one launch on a GPU.

    Raises TypeError, ValueError for an argument of the wrong type, shape, dtype, device, stride or value (values of
    tensors are not read), RuntimeError where the compiled operators are missing. Nothing is written then.
    """
    check_tree(tree)
    values: list[Tensor] = []
    numbers = [
        _mode(mode, values),
        _number("temperature", temperature, _FLOAT32_MAX, values),
        _number("posterior_threshold", posterior_threshold, _FLOAT32_MAX, values),
        _number("posterior_alpha", posterior_alpha, _FLOAT32_MAX, values),
        0.0 if top_k is None else float(_integer("top_k", top_k, 1, values)),
        1.0 if top_p is None else _number("top_p", top_p, 1.0, values),
    ]
    if numbers[5] == 0.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if isinstance(max_tokens, Tensor):
        limits, limit = max_tokens, 0
    else:
        limits, limit = None, _NO_LIMIT if max_tokens is None else _integer("max_tokens", max_tokens, 0)
    eos_tensor, eos = _eos(eos_token_id)
    generator, seed_value = _seed(seed)
    if seed is None and numbers[0] == _SAMPLING:
        raise ValueError('seed: mode "sampling" needs an int or a [2] int64 tensor, got None')
    arguments = (
        logits, tokens, tree.parents, tree.num_nodes, tree.max_depth, numbers, values or None, limits, limit,
        eos_tensor, eos, generator, seed_value,
    )  # fmt: skip
    if out is not None:
        tensors = (
            logits, tokens, tree.parents, tree.num_nodes, limits, eos_tensor, generator, *check_type("out", out),
            *values,
        )  # fmt: skip
        options = (limit, *numbers, *eos)  # `out` has the tree's depth
        if seed_value is None and not _calls.traced() and _known.call(tensors, options):
            return out
    elif torch.compiler.is_compiling():
        return Acceptance(*torch.ops.medusa_kernels.accept_candidates(*arguments))
    try:
        if out is None:
            return Acceptance(*_ops.op("accept_candidates", logits.is_cuda)(*arguments, True))
        launch = None
        if _calls.are_plain(tensors):
            launch = _calls.planned("accept_candidates", arguments, logits.device)
        check_out("out", out, logits.shape[0], tree.max_depth + 1, logits.device)
        if launch is None:
            for result, value in zip(out, torch.ops.medusa_kernels.accept_candidates(*arguments)):
                result.copy_(value)
        else:
            launch(_calls.addresses(tensors))
            if seed_value is None:  # else a call would be kept for each seed
                _known.remember(tensors, options, launch)
        return out
    except (AttributeError, TypeError, RuntimeError) as error:
        check_tensor("logits", logits, shape=(None, tree.size, None))
        check_tensor("tokens", tokens, shape=tuple(logits.shape[:2]), dtype=torch.int64, device=logits.device)
        others = {
            "tree": tree.parents, "tree.num_nodes": tree.num_nodes, "mode": mode, "temperature": temperature,
            "posterior_threshold": posterior_threshold, "posterior_alpha": posterior_alpha, "top_k": top_k,
            "top_p": top_p, "max_tokens": max_tokens, "eos_token_id": eos_token_id, "seed": seed,
        }  # fmt: skip
        for name, x in others.items():
            if isinstance(x, Tensor):
                check_tensor(name, x, device=logits.device)
        _ops.reraise(error)


_known = _calls.new_calls()


def check_tree(tree: object) -> None:
    if not isinstance(tree, TokenTree):
        raise TypeError(f"tree: expected a TokenTree, got {type(tree).__name__}")


def check_out(name: str, out: object, batch: int, columns: int, device: torch.device) -> None:
    """Raise if `out`, an argument called `name`, is no Acceptance that can be written to; columns: its P."""
    for field, dtype, x in zip(Acceptance._fields, _DTYPES, check_type(name, out)):
        shape = (batch, columns) if field in ("path", "tokens") else (batch,)
        check_tensor(f"{name}.{field}", x, shape=shape, dtype=dtype, device=device, contiguous=True)


def check_type(name: str, out: object) -> Acceptance:
    if not isinstance(out, Acceptance):
        raise TypeError(f"{name}: expected an Acceptance, got {type(out).__name__}")
    return out


# A parameter of each request as the operator takes it: a number, or -1 and a tensor more in `values`.


def _mode(mode: object, values: list[Tensor]) -> float:
    value = _MODES.get(mode) if isinstance(mode, (str, AcceptMode)) else None
    if value is None:
        if isinstance(mode, Tensor):
            values.append(mode)
            return -1.0
        error = ValueError if isinstance(mode, str) else TypeError
        raise error(f'mode: expected "greedy", "typical", "sampling" or a tensor of AcceptMode, got {mode!r}')
    return value


def _number(name: str, value: object, high: float, values: list[Tensor]) -> float:
    if type(value) is float and 0.0 <= value <= high:
        return value
    if isinstance(value, Tensor):
        values.append(value)
        return -1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not 0.0 <= value <= high:  # nor NaN
        raise ValueError(f"{name}: expected a finite number >= 0{'' if high > 1 else ', <= 1'}, got {value}")
    return float(value)


def _integer(name: str, value: object, low: int, values: list[Tensor] | None = None) -> int:
    if type(value) is int and low <= value <= _NO_LIMIT:
        return value
    if values is not None and isinstance(value, Tensor):
        values.append(value)
        return -1
    number = _index(name, value)
    if number < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {number}")
    return min(number, _NO_LIMIT)


def _index(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer or a tensor, got {type(value).__name__}") from None


def _eos(eos: Any) -> tuple[Tensor | None, list[int]]:
    if eos is None:
        return None, []
    if isinstance(eos, Tensor):
        return eos, []
    if isinstance(eos, int):
        return None, [_index("eos_token_id", eos)]
    if isinstance(eos, str) or not isinstance(eos, Sequence):
        raise TypeError(f"eos_token_id: expected an integer, a sequence of them or a tensor, got {type(eos).__name__}")
    return None, [_index("eos_token_id", token) for token in eos]


def _seed(seed: object) -> tuple[Tensor | None, int | None]:
    if seed is None:
        return None, None
    if isinstance(seed, Tensor):
        return seed, None
    value = _index("seed", seed)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {value}")
    return None, value
