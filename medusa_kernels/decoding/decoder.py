"""The decoder: draft a tree, run the model on it once, accept a path, compact the cache; again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..acceptance import accept_candidates
from ..integrations.transformers import TreeCache, check_model, prefill, tree_forward
from ..tree import TokenTree
from ..verify import finish_step
from .drafters import Drafter, DraftState

PHASES = ("prefill", "draft", "forward", "accept", "compact")


@dataclass
class DecodeStats:
    """What a generation took.

    steps:    forward passes over trees, the one that decides each prompt's first token not counted
    gains:    for each request, new tokens of each step that it took part in: accepted draft tokens and one more
    tokens:   new tokens of all requests, first tokens included
    seconds:  by phase: prefill (to the first token), draft, forward (model and LM head), accept, compact (and what the
              next step starts from); on a GPU draft to compact are measured with `profile=True` alone
    """

    steps: int = 0
    gains: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def tokens_per_step(self) -> float:
        """New tokens that a request gains in a step, on average: 1.0 in plain decoding."""
        gains = [gain for request in self.gains for gain in request]
        return sum(gains) / len(gains) if gains else 1.0


@dataclass
class Generation:
    """tokens: the new tokens of each request, an EOS included."""

    tokens: list[list[int]]
    stats: DecodeStats


class TreeDecoder:
    """Decodes with a `transformers` model, several tokens a step.

    model:          a causal model that takes its attention from the AttentionInterface (Llama, Mistral, Qwen, ...), on
                    one device; it is not changed
    drafter:        see `Drafter`; `NoDrafter()` makes this a plain decoder
    max_cache_len:  slots of each request's KV cache; None: as many as a call needs
    cuda_graph:     on a GPU, replay each step as one CUDA graph

    With a drafter on the device the host never waits for a step before it launches the next: it reads results one
    step behind.
    """

    def __init__(
        self, model: PreTrainedModel, drafter: Drafter, *, max_cache_len: int | None = None, cuda_graph: bool = True
    ):
        check_model(model)
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len: expected at least 1, got {max_cache_len}")
        self.model, self.drafter, self.max_cache_len = model, drafter, max_cache_len
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self.stats = DecodeStats()
        self._batch: _Batch | None = None

    def generate(self, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, **options) -> Generation:
        """Decode all prompts to their end; arguments as for `stream`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        for new in self.stream(prompts, max_new_tokens, **options):
            for text, more in zip(tokens, new):
                text += more
        return Generation(tokens, self.stats)

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int,
        *,
        mode: str = "greedy",
        temperature: float = 1.0,
        posterior_threshold: float = 0.09,
        posterior_alpha: float = 0.3,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        profile: bool = False,
    ) -> Iterator[list[list[int]]]:
        """Decode, yielding after each step the new tokens of each request (none once it is done).

        prompts:         token ids of each request, of any lengths, none empty; a [B, L] tensor: all of length L
        max_new_tokens:  of each request
        mode, temperature, posterior_threshold, posterior_alpha, top_k, top_p, seed: see `accept_candidates`. Greedy
                         gives the text of plain greedy decoding, up to rounding of the model
        eos_token_id:    one or several; None: the model's; (): none
        profile:         on a GPU, measure the phases of each step, and wait for each

        `self.stats` tells what it took, and is up to date after each step. One stream of a decoder at a time.
        Raises ValueError for an empty prompt and for prompts that the cache has no room for.
        """
        texts = [[int(token) for token in prompt] for prompt in prompts]
        vocab_size = check_model(self.model).vocab_size
        for b, text in enumerate(texts):
            if not text:
                raise ValueError(f"prompts: expected at least one token in each, got an empty one at {b}")
            if not 0 <= min(text) <= max(text) < vocab_size:
                raise ValueError(f"prompts: expected tokens 0..{vocab_size - 1}, got {min(text)}..{max(text)} at {b}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self.stats = stats = DecodeStats(gains=[[] for _ in texts])
        if not texts:
            return
        if eos_token_id is None:
            eos_token_id = self.model.generation_config.eos_token_id
        eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        options = {
            "mode": mode, "temperature": temperature, "posterior_threshold": posterior_threshold,
            "posterior_alpha": posterior_alpha, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip

        run = self._prepare(len(texts), max(map(len, texts)) + max_new_tokens + self.drafter.num_nodes)
        start = time.perf_counter()
        run.begin(texts, max_new_tokens, eos, seed, options)
        prefill(self.model, texts, run.cache)
        # The first token comes from a tree of one node: each prompt's last token.
        new = run.read(run.send(run.step(run.state.root.unsqueeze(1), run.root_alone, eos=None)))
        stats.seconds["prefill"] = time.perf_counter() - start
        stats.tokens = sum(map(len, new))
        yield new

        profile = profile or run.device.type == "cpu"
        if self.cuda_graph:
            run.capture(profile)
        lag = 1 if self.drafter.on_device and not profile else 0
        pending: list[tuple[Tensor, torch.cuda.Event | None]] = []
        while not all(run.state.finished):
            start = time.perf_counter()
            draft = None if self.drafter.on_device else self.drafter.draft(run.state)
            stats.seconds["draft"] += time.perf_counter() - start
            clock = _Clock(run.device) if profile else None
            if self.cuda_graph:
                out, clock = run.replay(draft)
            else:
                out = run.whole_step(None if draft is None else _pack(*draft, trim=True).to(run.device), clock)
            pending.append(run.send(out))
            if len(pending) <= lag:
                continue
            active = [not finished for finished in run.state.finished]
            new = run.read(pending.pop(0))
            if clock is not None:
                clock.add_to(stats.seconds)
            stats.steps += 1
            stats.tokens += sum(map(len, new))
            for gains, tokens, was_active in zip(stats.gains, new, active):
                if was_active:
                    gains.append(len(tokens))
            yield new

    def _prepare(self, batch: int, needed: int) -> "_Batch":
        if self.max_cache_len is not None and needed > self.max_cache_len:
            raise ValueError(
                f"max_cache_len: the longest prompt, max_new_tokens and a tree need {needed} slots, "
                f"got {self.max_cache_len}"
            )
        run = self._batch
        if run is None or run.cache.batch != batch or run.cache.max_cache_len < needed:
            self._batch = None  # free the old cache first
            slots = self.max_cache_len or -(-needed // 256) * 256  # few sizes: each needs a graph of its own
            self._batch = run = _Batch(self.model, self.drafter, batch, slots)
        return run


class _Batch:
    """The cache and the buffers of one batch. Whatever a step reads keeps its address, so that it can be captured."""

    def __init__(self, model: PreTrainedModel, drafter: Drafter, batch: int, max_cache_len: int):
        self.model, self.drafter, self.device = model, drafter, model.device
        self.cache = TreeCache(model, batch, max_cache_len)
        hidden_size = model.get_output_embeddings().weight.shape[1]
        root = torch.zeros(batch, dtype=torch.int64, device=self.device)
        hidden = torch.zeros(batch, hidden_size, dtype=model.dtype, device=self.device)
        self.state = DraftState(root, hidden, self.cache.cache_seqlens, [], [])
        # Tokens that each request may still have, its root counted; 0 where it is done.
        self.max_tokens = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.seed = torch.zeros(2, dtype=torch.int64, device=self.device)  # and the offset, which each step moves on
        # Trees of a drafter on the host, and what they are copied from without waiting.
        columns = 2 * drafter.num_nodes + 1
        self.packed = torch.zeros(batch, columns, dtype=torch.int64, device=self.device)
        self.staging = torch.zeros(batch, columns, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.root_alone = TokenTree.chain(0, self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_key: object = None

    def begin(
        self,
        texts: list[list[int]],
        max_new_tokens: int,
        eos: tuple[int, ...],
        seed: int | None,
        options: dict[str, Any],
    ) -> None:
        self.state.texts, self.state.finished = texts, [False] * len(texts)
        self.state.root.copy_(torch.tensor([text[-1] for text in texts]))
        self.max_tokens.fill_(max_new_tokens + 1)  # the first root is the prompt's last token
        self.key = (eos, seed is None, *options.items())  # all that a captured graph holds fast
        self.eos = torch.tensor(eos, dtype=torch.int64, device=self.device) if eos else None
        self.seed.copy_(torch.tensor([seed or 0, 0]))
        self.options = {**options, "seed": None if seed is None else self.seed}

    def step(self, tokens: Tensor, tree: TokenTree, eos: Tensor | None, clock: "_Clock | None" = None) -> Tensor:
        """Verify trees and move on to the next root. Returns [B, max_depth + 2] int64: new tokens, -1 padded, and
        whether the request is done. For a request that is done already nothing changes."""
        # None for a request that is done.
        num_nodes = self.max_tokens.clamp(0, 1) * (tree.size if tree.num_nodes is None else tree.num_nodes)
        tree = tree.with_num_nodes(num_nodes)
        logits, hidden = tree_forward(self.model, tokens, tree, self.cache)
        if clock:
            clock.mark("forward")
        # The parts of `verify_step`: they are timed one by one, and a prompt may end in an EOS.
        accepted = accept_candidates(logits, tokens, tree, max_tokens=self.max_tokens, eos_token_id=eos, **self.options)
        if clock:
            clock.mark("accept")
        self.cache.compact(accepted.path, accepted.accept_length)
        step = finish_step(accepted, self.max_tokens, self.state.root, self.eos, hidden, self.state.hidden)
        if clock:
            clock.mark("compact")
        return step.report

    def whole_step(self, packed: Tensor | None, clock: "_Clock | None" = None) -> Tensor:
        """Draft, or take from `packed` what a drafter on the host has drafted, and step."""
        if clock:
            clock.mark("start")
        if packed is None:
            tokens, tree = self.drafter.draft(self.state)
            if clock:
                clock.mark("draft")
        else:
            tokens, tree = _unpack(packed, self.drafter.max_depth)
        return self.step(tokens, tree, self.eos, clock)

    def capture(self, profile: bool) -> None:
        """Capture a whole step, unless the graph at hand serves."""
        if self.graph_key == (*self.key, profile):
            return
        packed = None if self.drafter.on_device else self.packed
        # Warming up runs steps for real, but a step changes nothing where all requests are done.
        max_tokens, seed = self.max_tokens.clone(), self.seed.clone()
        self.max_tokens.fill_(0)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.whole_step(packed)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.clock = _Clock(self.device) if profile else None
        self.graph, self.graph_key = torch.cuda.CUDAGraph(), (*self.key, profile)
        self.graph_eos = self.eos  # keeps it alive
        with torch.cuda.graph(self.graph, stream=stream):
            self.graph_out = self.whole_step(packed, self.clock)
        self.max_tokens.copy_(max_tokens)
        self.seed.copy_(seed)

    def replay(self, draft: tuple[Tensor, TokenTree] | None) -> tuple[Tensor, "_Clock | None"]:
        if draft is not None:
            packed = _pack(*draft)
            if packed.shape != self.staging.shape:
                raise ValueError(f"drafter: expected trees of {self.drafter.num_nodes} nodes, got {draft[1].size}")
            self.staging.copy_(packed)  # free: the host has read the step before
            self.packed.copy_(self.staging, non_blocking=True)
        assert self.graph is not None, "capture() comes first"
        self.graph.replay()
        return self.graph_out, self.clock

    def send(self, out: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start copying a step's result to the host."""
        if self.device.type == "cpu":
            return out, None
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    def read(self, sent: tuple[Tensor, torch.cuda.Event | None]) -> list[list[int]]:
        """Wait for a step's result: each request's new tokens, which also go into the state's texts."""
        out, event = sent
        if event is not None:
            event.synchronize()
        new = []
        for b, (*tokens, done) in enumerate(out.tolist()):
            new.append([token for token in tokens if token >= 0])
            self.state.texts[b] += new[b]
            self.state.finished[b] = bool(done)
        return new


def _pack(tokens: Tensor, tree: TokenTree, trim: bool = False) -> Tensor:
    """[B, 2 T + 1] int64: what a step needs of a host drafter's trees, in one copy. `trim` drops columns that are
    padding in every row."""
    batch, size = tokens.shape
    if tree.size != size:
        raise ValueError(f"drafter: expected a tree of as many nodes as it has tokens, {size}, got {tree}")
    num_nodes = torch.full((batch,), size) if tree.num_nodes is None else tree.num_nodes
    if trim:
        size = max(int(num_nodes.max()), 1)
    parents = tree.parents.expand(batch, -1)
    return torch.cat([tokens[:, :size], parents[:, :size], num_nodes.unsqueeze(1)], 1)


def _unpack(packed: Tensor, max_depth: int) -> tuple[Tensor, TokenTree]:
    size = packed.shape[1] // 2
    num_nodes = packed[:, 2 * size].int()
    tree = TokenTree.from_parents(packed[:, size : 2 * size], num_nodes, min(max_depth, size - 1))
    return packed[:, :size], tree


class _Clock:
    """Time between marks by phase: the host's on a CPU; on a GPU the stream's, inside a captured graph too."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # time.perf_counter() or an event

    def mark(self, phase: str) -> None:
        """What came since the mark before was `phase`."""
        now: Any = torch.cuda.Event(enable_timing=True, external=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record(torch.cuda.current_stream(self.device))
        self.marks.append((phase, now))

    def add_to(self, seconds: dict[str, float]) -> None:
        for (_, start), (phase, end) in pairwise(self.marks):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
