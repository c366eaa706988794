"""What every operator must compute, in eager PyTorch: the definition, written to be read, not to be fast.

Signatures are the operators'. Tests compare each kernel with these, in float64 where they compute with floats.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .acceptance import Acceptance, AcceptMode
from .tree import TokenTree
from .verify import VerifiedStep


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree: TokenTree,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`medusa_kernels.tree_attention`; `upcast` computes and returns float64."""
    batch, size, heads, head_dim = q.shape
    group = heads // k_cache.shape[2]
    dtype = torch.float64 if upcast else q.dtype
    wide = torch.float64 if upcast else torch.float32
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, size), -math.inf, dtype=wide, device=q.device)
    for b, length in enumerate(cache_seqlens.tolist()):
        nodes = size if tree.num_nodes is None else int(tree.num_nodes[b])
        if nodes == 0:
            continue
        slots = torch.arange(length + nodes, device=q.device)
        if block_table is None:
            place = (torch.full_like(slots, b), slots)
        else:
            place = (block_table[b].long()[slots // k_cache.shape[1]], slots % k_cache.shape[1])
        tree_place = (place[0][length:], place[1][length:])
        if k is not None and v is not None:
            _write(k_cache, tree_place, k[b, :nodes], k_scale)
            _write(v_cache, tree_place, v[b, :nodes], v_scale)
        keys = _read(k_cache, place, k_scale, dtype).repeat_interleave(group, 1)  # [length + nodes, H, D]
        values = _read(v_cache, place, v_scale, dtype).repeat_interleave(group, 1)

        depths = (tree.depths[b] if tree.batched else tree.depths)[:nodes]
        ancestors = (tree.mask[b] if tree.batched else tree.mask)[:nodes, :nodes]
        mask = torch.cat([ancestors.new_ones(nodes, length), ancestors], 1)
        if window is not None:
            position = torch.cat([slots[:length], length + depths])
            mask &= position > (length + depths - window).unsqueeze(1)

        scores = torch.einsum("thd,shd->hts", q[b, :nodes].to(dtype), keys).to(wide) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~mask, -math.inf)
        if sinks is not None:  # one more logit a head, which takes weight and gives no value
            scores = torch.cat([scores, sinks.to(wide).view(-1, 1, 1).expand(-1, nodes, 1)], 2)
        lse[b, :, :nodes] = scores.logsumexp(2)
        probs = scores.softmax(2)[:, :, : length + nodes].to(dtype)
        out[b, :nodes] = torch.einsum("hts,shd->thd", probs, values)
    return (out, lse) if return_lse else out


def _read(cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = cache.view(torch.uint8)[place].view(cache.dtype) if cache.itemsize == 1 else cache[place]
    return rows.to(dtype) if scale is None else (rows.to(scale.dtype) * scale.view(-1, 1)).to(dtype)


def _write(cache: Tensor, place: tuple[Tensor, Tensor], rows: Tensor, scale: Tensor | None) -> None:
    if cache.itemsize > 1:
        cache[place] = rows.to(cache.dtype)
    else:  # fp8 has no infinity: saturate
        limit = torch.finfo(cache.dtype).max
        scaled = rows.float() if scale is None else rows.float() / scale.view(-1, 1)
        cache.view(torch.uint8)[place] = scaled.clamp(-limit, limit).to(cache.dtype).view(torch.uint8)


def compact_kv_cache(
    kv: Tensor | Sequence[Sequence[Tensor]],
    path: Tensor,
    accept_length: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """`medusa_kernels.compact_kv_cache`: for each request and tensor, gather all rows of the path, then write them."""
    caches = [cache for layer in kv for cache in layer]
    num_blocks, block_size = caches[0].shape[:2]
    capacity = block_size * (1 if block_table is None else block_table.shape[1])

    def place(b: int, slot: int) -> tuple[int, int] | None:
        """Index of a slot in a cache, None if it has no such slot."""
        if not 0 <= slot < capacity:
            return None
        if block_table is None:
            return b, slot
        block = int(block_table[b, slot // block_size])
        return (block, slot % block_size) if 0 <= block < num_blocks else None

    for b, (length, accepted) in enumerate(zip(cache_seqlens.tolist(), accept_length.tolist())):
        if not 0 <= length <= capacity:
            continue
        nodes = path[b, : max(accepted + 1, 0)].tolist()
        moves = [(place(b, length + i), place(b, length + node)) for i, node in enumerate(nodes) if i < node < 512]
        moves = [(to, source) for to, source in moves if to is not None and source is not None]
        for cache in caches:
            rows = [cache[source].clone() for _, source in moves]
            for (to, _), row in zip(moves, rows):
                cache[to].copy_(row)
        cache_seqlens[b] = min(length + len(nodes), capacity)


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
    upcast: bool = False,
) -> Acceptance:
    """`medusa_kernels.accept_candidates`; `upcast` computes probabilities in float64."""
    batch, size, vocab = logits.shape
    each = [
        _per_request(AcceptMode[mode.upper()] if isinstance(mode, str) else mode, batch),
        *(_per_request(x, batch) for x in (temperature, posterior_threshold, posterior_alpha)),
        _per_request(0 if top_k is None else top_k, batch),
        _per_request(1.0 if top_p is None else top_p, batch),
        _per_request(2**31 if max_tokens is None else max_tokens, batch),
    ]
    eos = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    key: Any
    key, offset = seed.tolist() if isinstance(seed, Tensor) else (seed, 0)
    results: list[tuple[list[int], int, bool]] = []
    for b, (mode_, temperature_, threshold, alpha, k, p, limit) in enumerate(zip(*each)):
        nodes = size if tree.num_nodes is None else min(int(tree.num_nodes[b]), size)
        parents = (tree.parents[b] if tree.batched else tree.parents).tolist()
        toks = tokens[b].tolist()
        kids = {n: [c for c in range(n + 1, nodes) if parents[c] == n] for n in range(nodes)}
        if nodes <= 0 or limit <= 0:
            results.append(([], -1, True))
            continue
        if temperature_ == 0 or (mode_ == AcceptMode.SAMPLING and key is None):
            mode_ = AcceptMode.GREEDY

        def argmax(node: int, b: int = b) -> int | None:
            row = logits[b, node].float()
            numbers = row[~row.isnan()]
            return int((row == numbers.max()).nonzero()[0]) if len(numbers) else None

        def probs(node: int, b: int = b, temperature_: float = temperature_) -> Tensor | None:
            """Softmax, None where there is none."""
            row = logits[b, node].double() if upcast else logits[b, node].float()
            top = row.max()  # NaN if there is one
            return ((row - top) / temperature_).softmax(0) if top.isfinite() else None

        def uniforms(node: int, b: int = b) -> tuple[float, float]:
            first, second = _philox(key, offset, b, node)
            return first / 2**64, second / 2**64

        residual = None
        if mode_ == AcceptMode.SAMPLING:
            path, node = [0], 0
            while True:
                target = probs(node)
                residual = None if target is None else _truncated(target, k, p)
                below = kids[node] if residual is not None and len(path) <= tree.max_depth else []
                u, sum_below, taken = uniforms(node)[0], 0.0, None
                for c in below:
                    if 0 <= toks[c] < vocab and taken is None and residual is not None:
                        sum_below += float(residual[toks[c]])
                        residual[toks[c]] = 0.0  # so the next sibling of this token has no interval
                        taken = c if u < sum_below else None
                if taken is None:
                    break
                node = taken
                path.append(node)
        else:
            paths, scores, kept = {0: [0]}, {0: 0.0}, {}
            for node in range(nodes):
                if node not in paths or len(paths[node]) > tree.max_depth:
                    continue
                target = probs(node) if mode_ == AcceptMode.TYPICAL else None
                if target is not None:
                    entropy = -(target * (target + 1e-5).log()).sum()
                    kept[node] = target > min(threshold, alpha * float((-entropy).exp()))
                for c in kids[node]:
                    if mode_ == AcceptMode.GREEDY:
                        accepted = toks[c] == argmax(node)
                    else:
                        accepted = target is not None and 0 <= toks[c] < vocab and bool(kept[node][toks[c]])
                    if accepted:
                        paths[c] = paths[node] + [c]
                        scores[c] = scores[node] + (float(target[toks[c]].log()) if target is not None else 0.0)
            # Longest; typical: then highest score, then lowest end; greedy: then the lower node where they part.
            typical = mode_ == AcceptMode.TYPICAL
            path = min(paths.values(), key=lambda q: (-len(q), -scores[q[-1]], q[-1] if typical else q))
            if typical and key is not None and (target := probs(path[-1])) is not None:
                entropy = -(target * (target + 1e-5).log()).sum()
                residual = torch.where(target > min(threshold, alpha * float((-entropy).exp())), target, 0.0)

        path = path[:limit]
        ends = [i for i, node in enumerate(path) if toks[node] in eos]
        path = path[: ends[0] + 1] if ends else path
        if ends or len(path) == limit:
            results.append((path, -1, True))
        elif residual is None or not float(residual.sum()) > 0:
            results.append((path, argmax(path[-1]) or 0, False))
        else:
            mass = residual.double().cumsum(0)
            results.append((path, int((mass <= uniforms(path[-1])[1] * mass[-1]).sum()), False))
    if isinstance(seed, Tensor):
        seed[1] += 1
    columns, device = tree.max_depth + 1, logits.device
    nodes_out = torch.tensor([q + [-1] * (columns - len(q)) for q, _, _ in results], dtype=torch.int32, device=device)
    nodes_out = nodes_out.view(batch, columns)
    return Acceptance(
        torch.tensor([len(q) - 1 for q, _, _ in results], dtype=torch.int32, device=device),
        nodes_out,
        torch.tensor([q[-1] if q else -1 for q, _, _ in results], dtype=torch.int32, device=device),
        torch.where(nodes_out >= 0, tokens.gather(1, nodes_out.long().clamp(min=0)), -1),
        torch.tensor([token for _, token, _ in results], dtype=torch.int64, device=device),
        torch.tensor([done for _, _, done in results], dtype=torch.bool, device=device),
    )


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
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    **options: Any,
) -> VerifiedStep:
    """`medusa_kernels.verify_step`: acceptance, compaction, then request by request what they leave to do."""
    accepted = accept_candidates(logits, tokens, tree, max_tokens=max_tokens, eos_token_id=eos_token_id, **options)
    compact_kv_cache(kv, accepted.path, accepted.accept_length, cache_seqlens, block_table=block_table)
    eos = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    report = torch.full((len(root), tree.max_depth + 2), -1, dtype=torch.int64)
    for b, length in enumerate(accepted.accept_length.tolist()):
        if length >= 0:
            next_token = int(accepted.next_token[b])
            new = accepted.tokens[b, 1 : length + 1].tolist() + [next_token] * (next_token >= 0)
            report[b, : len(new)] = torch.tensor(new, dtype=torch.int64)
            max_tokens[b] -= length + 1
            if bool(accepted.finished[b]) or next_token in eos or max_tokens[b] <= 1:
                max_tokens[b] = 0
            if next_token >= 0:
                root[b] = next_token
                if hidden is not None and last_hidden is not None:
                    last_hidden[b] = hidden[b, int(accepted.last_node[b])]
        report[b, -1] = max_tokens[b] <= 0
    report = report.to(logits.device)
    return VerifiedStep(report[:, :-1], report[:, -1].bool(), report, accepted)


def _per_request(value, batch: int) -> list:
    return value.tolist() if isinstance(value, Tensor) else [value] * batch


def _truncated(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The distribution that top-k and then top-p leave; tokens as probable as one that is kept are kept."""
    if 0 < top_k < len(probs):
        probs = torch.where(probs >= probs.topk(top_k).values[-1], probs, 0.0)
        probs = probs / probs.sum()
    if top_p < 1:
        # Sorted by probability; a token's is compared with the mass before the first token of equal probability.
        values, order = probs.sort(descending=True)
        first = torch.searchsorted(-values, -values)
        above = torch.where(first > 0, values.cumsum(0)[(first - 1).clamp(min=0)], 0.0)
        probs = torch.zeros_like(probs).scatter(0, order, torch.where(above < top_p, values, 0.0))
    return probs / probs.sum()


def _philox(seed: int, offset: int, request: int, node: int) -> tuple[int, int]:
    """128 bits of Philox4x32-10 (Salmon et al., 2011) as two numbers of 64."""
    low = 0xFFFFFFFF
    c = [offset & low, offset >> 32 & low, request, node]
    k = [seed & low, seed >> 32 & low]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c[1] << 32 | c[0], c[3] << 32 | c[2]
