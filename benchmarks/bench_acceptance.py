"""Acceptance against its peers: from raw logits [B, T, V] to the accepted path and the next token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from bench_attention import tree_for
from common import Pool, Prepared, Unsupported, import_peer, num_sets
from torch import Tensor

from medusa_kernels import TokenTree, reference
from medusa_kernels.acceptance import accept_candidates

ACCEPTED = 3  # nodes below the root that the inputs accept
THRESHOLD, ALPHA = 0.09, 0.3
TOP_P = 0.9


@dataclass(frozen=True)
class Case:
    mode: str
    batch: int
    vocab: int
    nodes: int = 64
    recorded: dict[str, float] = field(default_factory=dict, compare=False)  # µs on an H100, measured elsewhere

    @property
    def name(self) -> str:
        return f"{self.mode}_b{self.batch}_v{self.vocab}"

    @property
    def num_bytes(self) -> int:
        """The logits, read once."""
        return self.batch * self.nodes * self.vocab * 2

    @property
    def flops(self) -> int:
        return 0


TABLE = {
    case.name: case
    for case in (
        Case("greedy", 1, 32000, recorded={"medusa_eager": 94, "argmax": 13, "argmax_sglang": 16.2}),
        Case("greedy", 8, 128256, recorded={"argmax": 80, "argmax_sglang": 83.5}),
        Case("typical", 1, 32000, recorded={"medusa_eager": 233, "batched_eager": 61, "compiled": 17}),
        Case("typical", 1, 128256, recorded={"medusa_eager": 401, "batched_eager": 249, "compiled": 37}),
        Case("typical", 8, 128256, recorded={"batched_eager": 1746, "compiled": 212}),
        Case("typical", 32, 128256, recorded={"batched_eager": 6835, "compiled": 759}),
        Case("sampling", 1, 32000),
        Case("sampling", 8, 128256),
    )
}
SETS = {"table": list(TABLE)}
TINY = [Case(mode, batch, 97, 16) for mode, batch in (("greedy", 1), ("typical", 1), ("typical", 3), ("sampling", 2))]


def parse_case(name: str) -> Case:
    for case in TINY:
        if case.name == name:
            return case
    if name not in TABLE:
        raise ValueError(f"cases: no case {name!r}; known: {', '.join(TABLE)}")
    return TABLE[name]


@dataclass
class Inputs:
    case: Case
    tree: TokenTree
    logits: list[Tensor]  # [B, T, V]
    tokens: list[Tensor]  # [B, T] int64

    @property
    def device(self) -> torch.device:
        return self.logits[0].device


def pool_numel(cases: list[Case], l2_bytes: int) -> int:
    return max(num_sets(c.num_bytes, l2_bytes) * (c.batch * c.nodes * c.vocab + 128) for c in cases)


def make_inputs(case: Case, pool: Pool, l2_bytes: int) -> Inputs:
    """Noise with one likely token a row (about 0.8 of the probability at V = 32000); drafts are right down to the
    `ACCEPTED`-th node of one of the deepest paths, and wrong elsewhere."""
    pool.reset()
    device = pool.data.device
    tree = tree_for(case.nodes)
    path = tree.paths[tree.paths.ge(0).sum(1).argmax()].long()
    generator, noise = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.nodes)
    parents = tree.parents.long().clamp(min=0)
    logits, tokens = [], []
    for _ in range(num_sets(case.num_bytes, l2_bytes)):
        likely = torch.randint(case.vocab, shape, generator=generator)
        draft = (likely[:, parents] + torch.randint(1, case.vocab, shape, generator=generator)) % case.vocab
        right = path[1 : ACCEPTED + 1]
        draft[:, right] = likely[:, parents[right]]
        logits.append(pool.take(*shape, case.vocab).normal_(generator=noise))  # other cases' likely tokens lay there
        logits[-1].scatter_(2, likely.unsqueeze(2).to(device), 14.0)
        tokens.append(draft.to(device))
    return Inputs(case, tree.to(device), logits, tokens)


# ---- contenders: calls that return (accept_length, last_node, next_token), each [B] ----

Outcome = tuple[Tensor, Tensor, Tensor]


def _ours(logits: Tensor, tokens: Tensor, tree: TokenTree, keywords: dict) -> Outcome:
    result = accept_candidates(logits, tokens, tree, **keywords)
    return result.accept_length, result.last_node, result.next_token


def ours(inputs: Inputs) -> Prepared:
    keywords: dict = {"mode": inputs.case.mode}
    if inputs.case.mode == "typical":
        keywords |= {"posterior_threshold": THRESHOLD, "posterior_alpha": ALPHA}
    if inputs.case.mode == "sampling":
        keywords |= {"top_p": TOP_P, "seed": torch.zeros(2, dtype=torch.int64, device=inputs.device)}
    calls = [partial(_ours, *both, inputs.tree, keywords) for both in zip(inputs.logits, inputs.tokens)]
    return Prepared(calls, lambda i: _check(inputs, i, calls[i]()))


def accepted_nodes(logits: Tensor, tokens: Tensor, parents: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Whether each node passes its test under its parent's logits, and log p of its token there; both [B, T]."""
    if mode == "greedy":
        passes = logits.argmax(-1)[:, parents] == tokens
        return passes, torch.zeros_like(tokens, dtype=torch.float32)
    p = logits.float().softmax(-1)
    entropy = -(p * torch.log(p + 1e-5)).sum(-1)
    threshold = (ALPHA * torch.exp(-entropy)).clamp(max=THRESHOLD)
    token_p = p[torch.arange(len(p), device=p.device).unsqueeze(1), parents, tokens]
    return token_p > threshold[:, parents], token_p.log()


def batched_accept(logits: Tensor, tokens: Tensor, parents: Tensor, paths: Tensor, mode: str) -> Outcome:
    """Medusa's `evaluate_posterior` for a batch, without reading anything back. `paths` [P, depth + 1], -1 padded."""
    passes, log_p = accepted_nodes(logits, tokens, parents, mode)
    at = paths[:, 1:].clamp(min=0)
    along = ((paths[:, 1:] >= 0) & passes[:, at]).long().cumprod(2)  # [B, P, depth]
    lengths = along.sum(2)
    accept_length = lengths.amax(1)
    score = torch.where(along > 0, log_p[:, at], 0.0).sum(2)
    best = torch.where(lengths == accept_length.unsqueeze(1), score, -torch.inf).argmax(1)
    last_node = paths[best].gather(1, accept_length.unsqueeze(1)).squeeze(1)
    row = logits.gather(1, last_node.view(-1, 1, 1).expand(-1, 1, logits.shape[2])).squeeze(1)
    return accept_length, last_node, row.argmax(-1)


def _tables(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.tree.parents.long().clamp(min=0), inputs.tree.paths.long()


def batched_eager(inputs: Inputs, accept: Callable[..., Outcome] = batched_accept) -> Prepared:
    if inputs.case.mode == "sampling":
        raise Unsupported("greedy and typical alone")
    parents, paths = _tables(inputs)
    calls = [partial(accept, *both, parents, paths, inputs.case.mode) for both in zip(inputs.logits, inputs.tokens)]
    return Prepared(calls, lambda i: _check(inputs, i, calls[i]()))


def compiled(inputs: Inputs) -> Prepared:
    if inputs.device.type != "cuda":
        raise Unsupported("compiling for a CPU says nothing here")
    torch._dynamo.reset()
    return batched_eager(inputs, torch.compile(batched_accept, dynamic=False))


def medusa_accept(logits: Tensor, tokens: Tensor, paths: Tensor, mode: str) -> Outcome:
    """As Medusa's decoder does it for one request: logits copied out to every path, then its eager
    `evaluate_posterior`, with its read-backs; padding of a path never counts as a match, as it does there."""
    real = paths[:, 1:] >= 0
    paths = paths.clamp(min=0)
    logits, candidates = logits[0, paths], tokens[0, paths]  # [P, depth + 1, V], [P, depth + 1]
    if mode == "greedy":
        mask = (candidates[:, 1:] == logits[:, :-1].argmax(-1)) & real
        lengths = mask.int().cumprod(1).sum(1)
        accept_length = lengths.max()
        best = torch.tensor(0, device=lengths.device) if accept_length == 0 else lengths.argmax()
    else:
        p = torch.softmax(logits[:, :-1].float(), -1)
        candidate_p = p.gather(2, candidates[:, 1:].unsqueeze(2)).squeeze(2)
        entropy = -(p * torch.log(p + 1e-5)).sum(-1)
        threshold = torch.minimum(torch.full_like(entropy, THRESHOLD), torch.exp(-entropy) * ALPHA)
        mask = (candidate_p > threshold) & real
        lengths = mask.int().cumprod(1).sum(1)
        accept_length = lengths.max()
        if accept_length == 0:
            best = torch.tensor(0, device=lengths.device)
        else:
            rows = torch.where(lengths == accept_length)[0]
            best = rows[candidate_p[rows, :accept_length].log().sum(1).argmax()]
    return accept_length.view(1), paths[best, accept_length].view(1), logits[best, accept_length].argmax(-1).view(1)


def medusa_eager(inputs: Inputs) -> Prepared:
    if inputs.case.batch > 1 or inputs.case.mode == "sampling":
        raise Unsupported("one request, greedy or typical")
    paths = inputs.tree.paths.long()
    calls = [partial(medusa_accept, *both, paths, inputs.case.mode) for both in zip(inputs.logits, inputs.tokens)]
    return Prepared(calls, lambda i: _check(inputs, i, calls[i]()), in_graph=False)


def argmax(inputs: Inputs) -> Prepared:
    """Only the argmax of each row, which a greedy verification kernel takes as its input."""
    if inputs.case.mode != "greedy":
        raise Unsupported("greedy alone")
    calls = [partial(torch.argmax, logits, -1) for logits in inputs.logits]

    def check(i: int) -> tuple[float, bool]:
        wrong = int((calls[i]() != inputs.logits[i].float().max(-1).indices).sum())
        return float(wrong), wrong == 0

    return Prepared(calls, check, same_work=False)


def argmax_sglang(inputs: Inputs) -> Prepared:
    """argmax, then SGLang's `verify_tree_greedy`, which walks the tree by first child and next sibling."""
    kernel, case = import_peer("sgl_kernel", inputs.device), inputs.case
    if case.mode != "greedy":
        raise Unsupported("greedy alone")
    parents = inputs.tree.parents.tolist()
    child, sibling = [-1] * case.nodes, [-1] * case.nodes
    for node in range(case.nodes - 1, 0, -1):
        sibling[node], child[parents[node]] = child[parents[node]], node
    index = torch.arange(case.batch * case.nodes, device=inputs.device).view(case.batch, case.nodes)
    child, sibling = (
        torch.tensor(x, device=inputs.device).expand(case.batch, -1).contiguous() for x in (child, sibling)
    )
    depth = inputs.tree.max_depth + 1

    def call(i: int) -> Outcome:
        predicts = torch.empty(case.batch * case.nodes, dtype=torch.int32, device=inputs.device)
        accept_index = torch.full((case.batch, depth), -1, dtype=torch.int32, device=inputs.device)
        accept_length = torch.empty(case.batch, dtype=torch.int32, device=inputs.device)
        target = inputs.logits[i].argmax(-1)
        kernel.verify_tree_greedy(
            predicts, accept_index, accept_length, inputs.tokens[i], index, child, sibling, target
        )
        last = accept_index.gather(1, accept_length.long().unsqueeze(1)).squeeze(1)
        return accept_length, last - index[:, 0], predicts[last.long()]

    calls = [partial(call, i) for i in range(len(inputs.logits))]
    return Prepared(calls, lambda i: _check(inputs, i, calls[i]()))


def flashinfer_top_p(inputs: Inputs) -> Prepared:
    """FlashInfer's softmax and top-p sampling of each row: what a chain's verification does, less the tree."""
    sampling, case = import_peer("flashinfer.sampling", inputs.device), inputs.case
    if case.mode != "sampling":
        raise Unsupported("sampling alone")

    def call(i: int) -> Tensor:
        p = sampling.softmax(inputs.logits[i].view(-1, case.vocab).float())
        return sampling.top_p_sampling_from_probs(p, TOP_P, seed=0, offset=0)

    calls = [partial(call, i) for i in range(len(inputs.logits))]

    def check(i: int) -> tuple[float, bool]:
        """The likely token holds most of the probability, so that most rows draw it."""
        likely = inputs.logits[i].view(-1, case.vocab).float().argmax(-1)
        share = float((calls[i]().long() == likely).double().mean())
        return 1 - share, share > 0.3

    return Prepared(calls, check, same_work=False)


def _check(inputs: Inputs, i: int, outcome: Outcome) -> tuple[float, bool]:
    """Requests whose outcome differs from the reference's; a sample must be a node of its depth with a token."""
    case, tree = inputs.case, inputs.tree
    accept_length, last_node, next_token = (x.long() for x in outcome)
    if case.mode == "sampling":
        fits = tree.depths.long()[last_node.clamp(0, case.nodes - 1)] == accept_length
        fits &= (last_node >= 0) & (last_node < case.nodes) & (next_token >= 0) & (next_token < case.vocab)
        wrong = int((~fits).sum())
        return float(wrong), wrong == 0
    expected = reference.accept_candidates(
        inputs.logits[i], inputs.tokens[i], tree, mode=case.mode, posterior_threshold=THRESHOLD, posterior_alpha=ALPHA
    )
    wrong = (accept_length != expected.accept_length) | (last_node != expected.last_node)
    wrong |= next_token != expected.next_token
    return float(wrong.sum()), not bool(wrong.any())


CONTENDERS: dict[str, Callable[[Inputs], Prepared]] = {
    f.__name__: f for f in (ours, medusa_eager, batched_eager, compiled, argmax, argmax_sglang, flashinfer_top_p)
}
