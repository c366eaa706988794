"""The whole decoding step: a tree against one token, on random weights of real models' shapes, each in a CUDA graph.

    python benchmarks/step.py --models vicuna_7b --batches 1 --lengths 1024,4096 --nodes 64

Prints each step as it is measured, then overheads with their parts and the size of tree that pays best, and writes
<card>_step.json and .png. README.md says what is compared with what.
"""

import argparse
import datetime
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import chain, pairwise, product
from pathlib import Path
from types import FunctionType

import torch
import triton
import triton.language as tl
from bench_attention import tree_for
from common import Limits, Pool, eager_us, first_line, measure_limits, relative_error
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from medusa_kernels import TokenTree, accept_candidates, tree_attention, verify_step

EPS = 1e-5
ACCEPTED = 3  # nodes below the root that a step accepts, so that compaction has rows to move
# In this order: a part's time is what the step takes longer with it than with those before it alone, so that all meet
# the caches as a step leaves them, and the times add up to the step's. SiLU(gate) * up is part of the matmuls where one
# call does it along with them, else, as silu_mul, of the rest.
PARTS = ("matmuls", "attention", "rest", "acceptance", "compaction")
OPERATORS = ("attention", "acceptance", "compaction")

# How often the rank-k token of each head was right, k = 1 ... 5, five heads: the published log of Medusa's heads for
# Vicuna-7B (FasterDecoding/Medusa, assets/medusa_acc.csv, run "7b"; there as top-k, the sums of these).
TOP_K = (
    (0.5604, 0.6717, 0.7271, 0.7599, 0.7799),
    (0.3164, 0.4236, 0.4851, 0.5282, 0.5625),
    (0.2010, 0.2879, 0.3475, 0.3834, 0.4169),
    (0.1474, 0.2250, 0.2737, 0.3109, 0.3397),
    (0.1175, 0.1866, 0.2346, 0.2721, 0.2998),
)
HEAD_ACCURACIES = torch.diff(torch.tensor(TOP_K, dtype=torch.float64), prepend=torch.zeros(len(TOP_K), 1), dim=1)
# Tokens a step that were published for trees of 64 nodes.
PUBLISHED = {
    "Medusa-1, Vicuna-7B, greedy": 2.32,  # Spec-Bench, mean accepted tokens (hemingkx/Spec-Bench, Leaderboard.md)
    "Medusa-2, worst of four models": 3.01,  # Medusa (arXiv 2401.10774) Table 1, acceleration rate: 3.01 to 3.51
    "Medusa-2, best of four models": 3.51,
}


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.heads_kv) * self.head_dim

    @property
    def weights(self) -> int:
        """Numbers that a step's matmuls read."""
        attention = self.qkv + self.heads * self.head_dim
        return self.hidden * (self.layers * (attention + 3 * self.intermediate) + self.vocab)

    def kv(self, batch: int, slots: int) -> int:
        return self.layers * 2 * batch * slots * self.heads_kv * self.head_dim


MODELS = {
    "vicuna_7b": Shape(4096, 32, 32, 32, 128, 11008, 32000),
    "llama3_8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "llama3.2_1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
    "tiny": Shape(64, 2, 4, 2, 16, 96, 101),  # for the smoke test
}


# ---- what is between the matmuls and attention; on a CPU in PyTorch ----


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch: from Hopper on a kernel begins while the one before ends (programmatic dependent launch)."""
    can = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": can, "launch_pdl": can}


@triton.jit
def wait_for_kernels_before(EARLY: tl.constexpr):
    """Until then nothing may be written, and read only what the kernel before does not write. From then on the next
    kernel may begin to wait."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rms_norm_kernel(
    residual_ptr, x_ptr, weight_ptr, out_ptr,  # [rows, hidden], [hidden]
    hidden, eps,
    HAS_X: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """residual += x, in place; out = its RMS norm."""
    offs = tl.arange(0, BLOCK)
    mask = offs < hidden
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    wait_for_kernels_before(EARLY)
    at = tl.program_id(0).to(tl.int64) * hidden + offs
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
    if HAS_X:
        residual += tl.load(x_ptr + at, mask=mask, other=0.0)
        tl.store(residual_ptr + at, residual, mask=mask)
    residual = residual.to(tl.float32)
    scale = tl.rsqrt(tl.sum(residual * residual, 0) / hidden + eps)
    tl.store(out_ptr + at, residual * scale * weight, mask=mask)


def rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor) -> Tensor:
    if residual.device.type == "cpu":
        if x is not None:
            residual += x
        return F.rms_norm(residual, (residual.shape[1],), weight, EPS)
    out = torch.empty_like(residual)
    rows, hidden = residual.shape
    rms_norm_kernel[(rows,)](
        residual, x, weight, out, hidden, EPS, HAS_X=x is not None, BLOCK=triton.next_power_of_2(hidden), num_warps=8,
        **early(residual.device),
    )  # fmt: skip
    return out


@triton.jit
def rotary_kernel(
    qkv_ptr,  # [rows, qkv], rotated in place: its first HEADS heads
    table_ptr,  # [positions, HEAD_DIM] fp32: cosines, then sines
    cache_seqlens_ptr, depths_ptr,
    nodes, stride,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    row = tl.program_id(0)
    position = tl.load(cache_seqlens_ptr + row // nodes) + tl.load(depths_ptr + row % nodes)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, HALF)[None, :]
    mask = head < HEADS
    # Each head loads the table for itself, which spares an exchange through shared memory.
    table_at = table_ptr + position * 2 * HALF + dim + 0 * head
    cos = tl.load(table_at, mask=mask, other=0.0)
    sin = tl.load(table_at + HALF, mask=mask, other=0.0)
    wait_for_kernels_before(EARLY)
    at = qkv_ptr + row.to(tl.int64) * stride + head * (2 * HALF) + dim
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, low * cos - high * sin, mask=mask)
    tl.store(at + HALF, high * cos + low * sin, mask=mask)


def rotary(qkv: Tensor, heads: int, table: Tensor, cache_seqlens: Tensor, depths: Tensor) -> None:
    """Rotate the first `heads` heads of each row, in place; rows beyond the batch's nodes are padding."""
    rows, head_dim = len(cache_seqlens) * len(depths), table.shape[1]
    if qkv.device.type == "cpu":
        cos, sin = table[(cache_seqlens.unsqueeze(1) + depths).flatten()].unsqueeze(1).chunk(2, -1)
        low, high = qkv[:rows, : heads * head_dim].unflatten(1, (heads, 2, head_dim // 2)).unbind(2)
        rotated = torch.stack([low * cos - high * sin, high * cos + low * sin], 2)
        qkv[:rows, : heads * head_dim] = rotated.flatten(1)
        return
    block_heads = 1024 // head_dim  # 16 bytes of each half of a head a thread
    rotary_kernel[(rows, triton.cdiv(heads, block_heads))](
        qkv, table, cache_seqlens, depths, len(depths), qkv.stride(0), HEADS=heads, BLOCK_HEADS=block_heads,
        HALF=head_dim // 2, num_warps=2, **early(qkv.device),
    )  # fmt: skip


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):
    wait_for_kernels_before(EARLY)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_up_ptr + row * 2 * size + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + offs, gate * tl.sigmoid(gate) * up, mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.device.type == "cpu":
        return F.silu(gate_up[:, :size]) * gate_up[:, size:]
    out = gate_up.new_empty(rows, size)
    block = 512 if rows < 16 else 1024
    grid = (rows, triton.cdiv(size, block))
    silu_mul_kernel[grid](gate_up, out, size, BLOCK=block, num_warps=4, **early(gate_up.device))
    return out


# ---- matmuls: for each shape and number of rows the fastest of what is well kept ----


Linear = Callable[[Tensor, Tensor], Tensor]  # x [rows, in], weight [out, in] -> [rows, out], or gated [rows, out / 2]
OPS = ("linear", "linear", "gated", "linear")  # of a layer's weights: q, k and v; out; gate and up; down


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(gate) * up; by two linears, as torch.compile makes one kernel of all that for one row, but not by one."""
    gate, up = weight.chunk(2)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@dataclass(frozen=True)
class WithSiluMul:
    """Gated by a linear, and silu_mul after it."""

    linear: Linear

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return silu_mul(self.linear(x, weight))


def blas_linear(library: str, x: Tensor, weight: Tensor) -> Tensor:
    """F.linear by "cublas" or "cublaslt": a global preference, put back."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@cache
def compiled(call: Linear, attempt: int) -> Linear:
    """Each attempt is tuned anew; from the second on its kernels begin early, where they can."""
    # Every shape is a recompile of this one function; beyond the limits it would quietly run uncompiled.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    mode = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    options = {  # torch.compile takes a mode or options, not both
        **mode, "max_autotune_gemm_backends": "ATEN,TRITON", "fx_graph_cache": False, "autotune_local_cache": False,
        "triton.enable_pdl": attempt > 1,
    }  # fmt: skip
    code = call.__code__.replace(co_name=f"{call.__name__}_{attempt}")  # of its own, by which dynamo knows it
    return torch.compile(FunctionType(code, call.__globals__), options=options, dynamic=False)


def attempts(name: str, call: Linear, rows: int) -> dict[str, Linear]:
    """By torch.compile; of one row, plain decoding's, for which its tuning may be 5% off, three, of which the best
    counts."""
    return {f"{name}: attempt {i}": compiled(call, i) for i in (range(1, 4) if rows == 1 else [1])}


@dataclass(frozen=True)
class Quack:
    """A config of quack's GEMM (Dao-AILab/quack), and a linear by it.

    width:   rows of the weight that a block takes
    cluster: blocks that get x by one multicast
    tile_k:  of the inner dimension, at a time
    """

    width: int
    cluster: int
    tile_k: int = 64
    pingpong: bool = False

    @staticmethod
    def tile_rows(rows: int) -> int:
        """Of x that a block takes."""
        return 64 if rows <= 64 else 128

    def suits(self, rows: int, out: int, sms: int) -> bool:
        """It exists for so many rows, and its blocks leave few multiprocessors without work."""
        blocks = -(-out // self.width)
        exists = not self.pingpong or self.width <= {64: 256, 128: 208}[self.tile_rows(rows)]
        return exists and blocks >= 0.84 * sms * -(-blocks // sms)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        from quack.gemm import gemm

        out, rows = x.new_empty(len(x), len(weight)), self.tile_rows(len(x))
        gemm(x, weight, out, None, None, rows, self.width, 1, self.cluster, tile_K=self.tile_k, pingpong=self.pingpong)
        return out

    def gated(self, x: Tensor, weight: Tensor) -> Tensor:
        """All at once; its blocks take rows of gate and of up in turns (concat_layout), of a weight as it is."""
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm_gated

        config = GemmConfig(
            self.tile_rows(len(x)), self.width, self.tile_k, pingpong=self.pingpong, is_dynamic_persistent=False,
            cluster_m=1, cluster_n=self.cluster,
        )  # fmt: skip
        options = {"activation": "swiglu", "store_preact": False, "concat_layout": ("B",)}
        return gemm_gated(x, weight.T, config=config, **options)[1]


# The fastest linears of some 90 on an H200, of 64 rows and weights of 4096 to 128256.
QUACKS = (
    Quack(32, 1), Quack(48, 1), Quack(96, 1), Quack(112, 2, 128, pingpong=True), Quack(128, 2, 128, pingpong=True),
    Quack(176, 1, 128), Quack(224, 2, 128),
)  # fmt: skip
# Gated, for which a width is a multiple of 32.
GATED_QUACKS = (
    Quack(64, 1, pingpong=True), Quack(96, 1, pingpong=True), Quack(128, 2, 128, pingpong=True),
    Quack(192, 1, pingpong=True), Quack(192, 1, 128, pingpong=True), Quack(224, 1, 128, pingpong=True),
    Quack(224, 2, 128, pingpong=True),
)  # fmt: skip


def suitable(quacks: Sequence[Quack], rows: int, out: int, device: torch.device) -> list[Quack]:
    """Where quack is installed, those that suit so many rows and a weight of `out`."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 9 or importlib.util.find_spec("quack") is None:
        return []
    return [quack for quack in quacks if quack.suits(rows, out, properties.multi_processor_count)]


def linears(rows: int, device: torch.device, out: int) -> dict[str, Linear]:
    """What can multiply so many rows by a weight of `out`, by name; "library: config" where a library has several."""
    if device.type == "cpu":
        return {"F.linear": F.linear}
    found: dict[str, Linear] = {library: partial(blas_linear, library) for library in ("cublas", "cublaslt")}
    if rows <= 16:  # of more it is slower than quack
        found |= attempts("inductor", linear, rows)
    if rows <= 128:
        found |= {f"quack: {quack}": quack for quack in suitable(QUACKS, rows, out, device)}
    return found


def gateds(rows: int, device: torch.device, out: int) -> dict[str, Linear]:
    """What can gate so many rows by a weight of `out`: each linear with silu_mul, and "fused" what does all at once."""
    found: dict[str, Linear] = {name: WithSiluMul(call) for name, call in linears(rows, device, out).items()}
    if device.type == "cpu":
        return found
    if rows == 1:  # of more it makes several kernels
        found |= attempts("inductor fused", gated, rows)
    if rows <= 128:
        found |= {f"quack fused: {quack}": quack.gated for quack in suitable(GATED_QUACKS, rows, out, device)}
    return found


def linears_us(
    candidates: dict[str, Linear], x: Tensor, weights: Sequence[Tensor], report, reference: Linear = F.linear
) -> dict[str, float]:
    """µs a call of each candidate that is right, in turns over the weights, so that they come from memory, and each
    after an RMS norm of its input, as what comes before it in a step is as small; that one's own time is taken off."""
    want, right = reference(x, weights[0]), {}
    for name, call in candidates.items():
        try:
            pairs = zip(call(x, weights[0]).split(16), want.split(16))  # relative_error takes fp64 copies
            error = max(relative_error(got, wanted) for got, wanted in pairs)
            what = f"off by {error:.1e}" if error > 0.01 else None
        except Exception as raised:
            what = first_line(raised)
        if what is None:
            right[name] = call
        else:
            report(f"matmul {list(weights[0].shape)} of {len(x)} rows: {name} left out, {what}")
    weights, ones = list(weights) * -(-8 // len(weights)), torch.ones_like(x[0])

    def over_weights(call: Linear) -> None:
        for weight in weights:
            call(rms_norm(x, None, ones), weight)

    chosen = [lambda x, weight: x, *right.values()]
    norm, *times = times_us([partial(over_weights, call) for call in chosen], x.device, 15)
    return {name: (us - norm) / len(weights) for name, us in zip(right, times)}


# ---- the model and its steps ----


class Model:
    """Random weights, every layer's its own; the embedding, of which a step reads a few rows, is the LM head's."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, report=print):
        self.shape, self.report = shape, report
        pool = Pool(shape.weights + 128 * (4 * shape.layers + 1), device, dtype)

        def linear(out: int, inner: int) -> Tensor:
            return pool.take(out, inner).mul_(inner**-0.5)

        inner = shape.heads * shape.head_dim
        self.layers = [
            (linear(shape.qkv, shape.hidden), linear(shape.hidden, inner),
             linear(2 * shape.intermediate, shape.hidden), linear(shape.hidden, shape.intermediate))
            for _ in range(shape.layers)
        ]  # fmt: skip
        # Logits of standard deviation 4, so that typical acceptance does not take any token for a plausible one.
        self.head = linear(shape.vocab, shape.hidden).mul_(4)
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.chosen: dict[tuple[str, int, torch.Size], Linear] = {}
        self.matmuls: list[dict] = []  # how that came about: a row each

    def choose(self, rows: int) -> None:
        """Choose what multiplies this many rows, shape by shape of weight; once."""
        weights: dict[tuple[str, torch.Size], list[Tensor]] = {}
        for op, weight in (*chain(*(zip(OPS, layer) for layer in self.layers)), ("linear", self.head)):
            weights.setdefault((op, weight.shape), []).append(weight)
        for (op, shape), same in weights.items():
            if (op, rows, shape) in self.chosen:
                continue
            find, reference = (gateds, gated) if op == "gated" else (linears, F.linear)
            candidates = find(rows, self.head.device, shape[0])
            x = self.head.new_empty(rows, shape[1]).normal_()
            times = linears_us(candidates, x, same, self.report, reference)
            best = min(times, key=times.__getitem__)
            self.chosen[op, rows, shape] = candidates[best]
            fastest: dict[str, float] = {}  # by library
            for name, us in times.items():
                library = name.partition(":")[0]
                fastest[library] = min(us, fastest.get(library, us))
            self.matmuls.append({"op": op, "rows": rows, "shape": list(shape), "best": best, "candidates_us": fastest,
                                 "date": datetime.date.today().isoformat()})  # fmt: skip

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.chosen["linear", len(x), weight.shape](x, weight)

    def gated(self, x: Tensor, weight: Tensor, rest: bool = True) -> Tensor:
        """Without the rest, gate and up as they are where silu_mul is a kernel of its own."""
        call = self.chosen["gated", len(x), weight.shape]
        return (call.linear if isinstance(call, WithSiluMul) and not rest else call)(x, weight)


class Context:
    """A model with a filled cache of `length` tokens a request."""

    def __init__(self, model: Model, batch: int, length: int, most_nodes: int):
        shape, device, dtype = model.shape, model.head.device, model.head.dtype
        self.model, self.batch, self.length = model, batch, length
        slots = -(-(length + most_nodes) // 256) * 256
        self.kv = torch.empty(shape.layers, 2, batch, slots, shape.heads_kv, shape.head_dim, device=device, dtype=dtype)
        self.kv.normal_(generator=torch.Generator(device).manual_seed(1))
        self.caches = [layer.unbind(0) for layer in self.kv.unbind(0)]
        self.start = torch.full((batch,), length, dtype=torch.int32, device=device)
        self.roots = torch.arange(1, batch + 1, device=device)
        angle = (
            torch.arange(slots, device=device).unsqueeze(1)
            * 10000.0 ** -torch.linspace(0, 1, shape.head_dim // 2 + 1, device=device)[:-1]
        )
        self.rotary = torch.cat([angle.cos(), angle.sin()], 1)


class Step:
    """A step of a batch on fixed buffers; of a tree, or with a chain of one node and `plain`, of plain decoding.

    rows:       of every matmul: the batch's nodes, and as many of padding as it takes
    attention:  "ours", or for plain decoding "sdpa"
    sampler:    plain decoding's: "argmax", PyTorch's, or "ours"
    """

    def __init__(self, context: Context, tree: TokenTree, rows: int, mode: str = "greedy", plain: bool = False,
                 attention: str = "ours", sampler: str = "argmax"):  # fmt: skip
        self.context, self.tree, self.rows, self.mode = context, tree, rows, mode
        self.plain, self.attention, self.sampler = plain, attention, sampler
        shape, device, dtype = context.model.shape, context.kv.device, context.kv.dtype
        context.model.choose(rows)  # here, as a graph's capture would be too late
        self.batch, self.nodes = context.batch, tree.size
        generator = torch.Generator(device).manual_seed(2)
        tokens = torch.randint(shape.vocab, (self.batch, self.nodes), device=device, generator=generator)
        tokens[:, 0] = context.roots
        self.ids = F.pad(tokens.flatten(), (0, rows - tokens.numel()))
        self.tokens = self.ids[: tokens.numel()].view(self.batch, self.nodes)
        self.cache_seqlens = context.start.clone()
        self.max_tokens = torch.full_like(self.cache_seqlens, 2**30)
        self.root = context.roots.clone()
        # Inputs of the matmuls where what comes before them is left out.
        self.x, self.attended, self.activated = (
            torch.randn(rows, size, device=device, dtype=dtype, generator=generator)
            for size in (shape.hidden, shape.heads * shape.head_dim, shape.intermediate)
        )

    @property
    def name(self) -> str:
        return f"{self.rows} rows" + (f", {self.attention}, {self.sampler}" if self.plain else "")

    def forward(self, parts: int = len(PARTS)) -> Tensor:
        """logits [B, T, V], by the first `parts` of PARTS."""
        model, shape, rest = self.context.model, self.context.model.shape, parts > 2
        x = residual = self.x
        if rest:
            residual = F.embedding(self.ids, model.head)
            x = rms_norm(residual, None, model.norm)
        attended = self.attended
        for layer, (w_qkv, w_out, w_gate_up, w_down) in enumerate(model.layers):
            qkv = model.linear(x, w_qkv)
            if rest:
                rotary(qkv, shape.heads + shape.heads_kv, self.context.rotary, self.cache_seqlens, self.tree.depths)
            if parts > 1:
                attended = self.attend(layer, qkv)
            out = model.linear(attended, w_out)
            x = rms_norm(residual, out, model.norm) if rest else self.x
            activated = model.gated(x, w_gate_up, rest)
            down = model.linear(activated if rest else self.activated, w_down)
            x = rms_norm(residual, down, model.norm) if rest else self.x
        return model.linear(x, model.head)[: self.batch * self.nodes].view(self.batch, self.nodes, -1)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        shape, real = self.context.model.shape, self.batch * self.nodes
        heads = qkv[:real].view(self.batch, self.nodes, -1, shape.head_dim)
        q, k, v = heads.split((shape.heads, shape.heads_kv, shape.heads_kv), 2)
        k_cache, v_cache = self.context.caches[layer]
        if self.attention == "ours":
            out = self.attended[:real].view(q.shape)
            tree_attention(q, k_cache, v_cache, self.tree, self.cache_seqlens, k=k, v=v, out=out)
            return self.attended
        # Lengths are equal and known here, which makes it easier for SDPA than they are in a decoder.
        length = self.context.length
        new = heads[:, 0, shape.heads :].unflatten(1, (2, -1)).transpose(0, 1)
        self.context.kv[layer, :, :, length].copy_(new)
        keys, values = (cache[:, : length + 1].transpose(1, 2) for cache in (k_cache, v_cache))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, enable_gqa=shape.heads_kv != shape.heads
        ).transpose(1, 2)
        if self.rows == real:
            return out.reshape(real, -1)
        self.attended[:real] = out.flatten(2).flatten(0, 1)
        return self.attended

    def run(self, parts: int = len(PARTS)):
        """The step, by the first `parts` of PARTS; it begins at the same place each time."""
        self.cache_seqlens.copy_(self.context.start)
        logits = self.forward(parts)
        if parts < 4:
            return None
        if not self.plain and parts == 4:
            return accept_candidates(logits, self.tokens, self.tree, mode=self.mode, max_tokens=self.max_tokens)
        if not self.plain:
            return verify_step(
                logits, self.tokens, self.tree, self.context.kv, self.cache_seqlens, self.max_tokens, self.root,
                mode=self.mode,
            )  # fmt: skip
        if self.sampler == "argmax":
            torch.argmax(logits[:, 0], -1, out=self.root)
        else:
            self.root.copy_(accept_candidates(logits, self.tokens, self.tree).next_token)
        if parts == 5:
            self.cache_seqlens.add_(1)
        return self.root

    def make_drafts_right(self) -> None:
        """Give the first nodes of the deepest path the tokens that the model wants there."""
        paths = self.tree.paths.tolist()
        path = [node for node in max(paths, key=lambda p: sum(n >= 0 for n in p)) if node >= 0]
        for above, node in list(pairwise(path))[:ACCEPTED]:
            self.cache_seqlens.copy_(self.context.start)
            self.tokens[:, node] = self.forward()[:, above].argmax(-1)

    def wrong(self, plain_logits: Tensor) -> str | None:
        """What is wrong with this step, if anything: its root sees what plain decoding sees, up to what bf16 makes of
        it in all layers, and drafts that are right are accepted."""
        self.cache_seqlens.copy_(self.context.start)
        error = relative_error(self.forward()[:, 0], plain_logits)
        if error > 0.1:  # NaN counts as infinite
            return f"the root's logits are off by {error:.1e}"
        if self.plain:
            return None
        lengths = self.run().accepted.accept_length
        return None if int(lengths.min()) >= min(ACCEPTED, self.tree.max_depth) else f"accepted {lengths.tolist()}"


# ---- measuring ----


@dataclass
class Measured:
    """The best of the candidates for one step. `nodes == 1` is plain decoding."""

    model: str
    batch: int
    length: int
    nodes: int
    mode: str
    us: float
    parts_us: dict[str, float]
    best: str
    candidates_us: dict[str, float]
    floor_us: float | None  # the weights and the cache read once
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def where(self) -> tuple[str, int, int]:
        return self.model, self.batch, self.length

    @property
    def key(self) -> tuple:
        return *self.where, self.nodes, self.mode


@dataclass
class Drafted:
    """What the package's drafter takes for a batch's trees of so many nodes, once their step is done: as many heads as
    the published ones, each with a projection to the vocabulary of its own, and each one's likeliest tokens."""

    model: str
    batch: int
    nodes: int
    us: float
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def key(self) -> tuple[str, int, int]:
        return self.model, self.batch, self.nodes


def times_us(calls: Sequence[Callable[[], object]], device: torch.device, replays: int) -> list[float]:
    """Median µs of each call in a CUDA graph of its own; the graphs take turns, so that their differences do not drift
    with the card's clock."""
    if device.type == "cpu":
        return [eager_us([call], device) for call in calls]
    graphs, pool = [], torch.cuda.graph_pool_handle()  # one pool: no graph's results are read
    for call in calls:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range((replays + 1) * len(graphs) + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        graphs[i % len(graphs)].replay()
        event.record()
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)][
        len(graphs) :
    ]  # the first round warms up
    return [statistics.median(times[i :: len(graphs)]) for i in range(len(graphs))]


def measure_step(name: str, candidates: Sequence[Step], limits: Limits, replays: int) -> Measured:
    """Time all candidates whole, and the parts of the best."""
    device = candidates[0].context.kv.device
    times = dict(zip((step.name for step in candidates), times_us([step.run for step in candidates], device, replays)))
    best = min(candidates, key=lambda step: times[step.name])
    until = times_us([partial(best.run, n + 1) for n in range(len(PARTS))], device, replays)
    parts = {part: us - before for part, us, before in zip(PARTS, until, [0.0, *until])}
    context, shape = best.context, best.context.model.shape
    numbers = shape.weights + shape.kv(context.batch, context.length + best.nodes)
    floor = numbers * context.kv.itemsize / limits.read_tb_s * 1e-6 if limits.read_tb_s else None
    mode = "greedy" if best.plain else best.mode
    return Measured(name, context.batch, context.length, best.nodes, mode, until[-1], parts, best.name, times, floor)


# Rows that plain decoding's are padded to, as some libraries multiply so many faster than fewer.
PADDED = (16, 64)


def plain_candidates(context: Context) -> list[Step]:
    """Every row count with every attention and sampler: plain decoding as fast as we know how."""
    tree = TokenTree.chain(0, context.kv.device)
    rows = sorted({context.batch, *(n for n in PADDED if n > context.batch)})
    return [
        Step(context, tree, n, plain=True, attention=attention, sampler=sampler)
        for n, attention, sampler in product(rows, ("ours", "sdpa"), ("argmax", "ours"))
    ]


def tree_candidates(context: Context, nodes: int, mode: str) -> list[Step]:
    tree, real = tree_for(nodes).to(context.kv.device), context.batch * nodes
    steps = [Step(context, tree, rows, mode) for rows in sorted({real, -(-real // 16) * 16})]
    for step in steps:
        step.make_drafts_right()
    return steps


def measure_drafts(name: str, model: Model, args) -> list[Drafted]:
    """For every batch and size of tree. The heads' weights are read from memory each time, as they are in a step."""
    from medusa_kernels.decoding import DraftState, MedusaDrafter, MedusaHeads

    vocab, hidden = model.head.shape
    device = model.head.device
    room = len(TOP_K) * (vocab + hidden) * hidden * model.head.itemsize
    if device.type == "cuda" and room > 0.9 * torch.cuda.mem_get_info(device)[0]:
        model.report(f"{name}: drafting skipped, its heads take {room / 1e9:.0f} GB")
        return []
    heads = MedusaHeads(len(TOP_K), 1, model.head.new_empty(len(TOP_K), vocab, hidden).normal_())
    drafters = [MedusaDrafter(heads, tree_for(nodes)) for nodes in args.nodes]
    found = []
    for batch in args.batches:
        root = torch.zeros(batch, dtype=torch.int64, device=device)
        state = DraftState(root, model.head.new_empty(batch, hidden).normal_(), root.int(), [], [])
        times = times_us([partial(drafter.draft, state) for drafter in drafters], device, args.replays)
        found += [Drafted(name, batch, nodes, us) for nodes, us in zip(args.nodes, times)]
    return found


def room_bytes(shape: Shape, batch: int, length: int, nodes: int, itemsize: int) -> int:
    """What a context and its largest step take beside the weights; logits and activations twice, for two graphs."""
    rows = batch * nodes
    activations = rows * (shape.vocab + 3 * shape.intermediate + 2 * shape.qkv + 6 * shape.hidden)
    return (shape.kv(batch, length + nodes + 256) + 2 * activations) * itemsize


def measure_all(
    args, limits: Limits, device: torch.device, report
) -> tuple[list[Measured], list[dict], list[Drafted], int]:
    """Everything that was asked for and fits, the choices of matmuls, drafting, and how many candidates were wrong."""
    results, matmuls, drafts, wrong = [], [], [], 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in args.models:
        shape = MODELS[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if shape.weights * dtype.itemsize > 0.9 * torch.cuda.mem_get_info(device)[0]:
                report(f"{name}: skipped, its weights do not fit")
                continue
        model = Model(shape, device, dtype, report)
        for batch, length in product(args.batches, args.lengths):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                room = room_bytes(shape, batch, length, max(args.nodes), dtype.itemsize)
                free = torch.cuda.mem_get_info(device)[0]
                if room > 0.95 * free:
                    gb = f"{room / 1e9:.0f} GB of {free / 1e9:.0f} GB left"
                    report(f"{name} B={batch} L={length}: skipped, takes {gb}")
                    continue
            context = Context(model, batch, length, max(args.nodes))
            plain_logits = None
            for nodes in (1, *args.nodes):
                candidates = plain_candidates(context) if nodes == 1 else tree_candidates(context, nodes, args.mode)
                if plain_logits is None:
                    plain_logits = candidates[0].forward()[:, 0].clone()
                right = []
                for step in candidates:
                    if (what := step.wrong(plain_logits)) is None:
                        right.append(step)
                    else:
                        report(f"{name} B={batch} L={length} nodes={nodes} with {step.name}: WRONG, {what}")
                        wrong += 1
                if right:
                    results.append(measure_step(name, right, limits, args.replays))
                    report(describe(results[-1]))
                candidates = right = step = None  # their buffers
            context = None
        matmuls += [{"model": name} | row for row in model.matmuls]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        drafts += measure_drafts(name, model, args)
        model = None
    return results, matmuls, drafts, wrong


# ---- what it says ----


def describe(r: Measured) -> str:
    parts = ", ".join(f"{part} {us:.1f}" for part, us in r.parts_us.items())
    others = ", ".join(f"{name} {us:.0f}" for name, us in r.candidates_us.items() if name != r.best)
    return f"{r.model} B={r.batch} L={r.length} nodes={r.nodes}: {r.us:.1f} µs ({parts}) with {r.best}" + (
        f"; {others}" if others else ""
    )


def overheads(results: Sequence[Measured], drafts: Sequence[Drafted] = ()) -> list[dict]:
    """A row a tree step: its time over plain decoding's, split by parts in percent of plain decoding's, and what comes
    of it with the acceptance model, without and with drafting, and, for 64 nodes, with published tokens a step."""
    plain = {r.where: r for r in results if r.nodes == 1}
    draft_us = {d.key: d.us for d in drafts}
    rows = []
    for r in results:
        if r.nodes == 1 or r.where not in plain:
            continue
        base = plain[r.where]
        overhead = r.us / base.us
        tree = TokenTree.search(HEAD_ACCURACIES, r.nodes)
        tokens = float(tree.expected_tokens(HEAD_ACCURACIES)[-1])
        drafting = draft_us.get((r.model, r.batch, r.nodes))
        percent = {part: 100 * (r.parts_us[part] - base.parts_us[part]) / base.us for part in PARTS}
        rows.append({
            "model": r.model, "batch": r.batch, "length": r.length, "nodes": r.nodes, "mode": r.mode, "date": r.date,
            "plain_us": base.us, "us": r.us, "overhead": overhead,
            "parts_percent": percent, "operators_percent": sum(percent[part] for part in OPERATORS),
            "tokens": tokens, "speed_up": tokens / overhead, "draft_us": drafting,
            "speed_up_with_drafts": None if drafting is None else tokens * base.us / (r.us + drafting),
            "published_speed_up": {k: v / overhead for k, v in PUBLISHED.items()} if r.nodes == 64 else {},
        })  # fmt: skip
    return rows


def best_sizes(results: Sequence[Measured]) -> list[dict]:
    """For each model, batch and length the measured size of tree, plain decoding's 1 among them, that pays best."""
    steps: dict[tuple[str, int, int], dict[int, float]] = {}
    for r in results:
        steps.setdefault(r.where, {})[r.nodes] = r.us
    tokens = TokenTree.search(HEAD_ACCURACIES, max(r.nodes for r in results)).expected_tokens(HEAD_ACCURACIES)
    rows = []
    for (model, batch, length), step_us in steps.items():
        size = TokenTree.best_size(HEAD_ACCURACIES, step_us)
        speed_up = float(tokens[size - 1]) * step_us[1] / step_us[size] if 1 in step_us else None
        rows.append({"model": model, "batch": batch, "length": length, "nodes": size, "speed_up": speed_up,
                     "step_us": step_us})  # fmt: skip
    return rows


def tables(
    results: Sequence[Measured], matmuls: Sequence[dict], drafts: Sequence[Drafted], limits: Limits, smoke: bool
) -> list[Table]:
    title = f"{limits.device} | torch {limits.torch}, triton {limits.triton}"
    title += " | SMOKE TEST: wall-clock on a CPU, no measure of speed" if smoke else ""
    first = Table(title=f"tree step against plain decoding | {title}")
    for column in ("model", "B", "L", "nodes", "plain µs", "tree µs", "overhead", *(f"{p} %" for p in PARTS),
                   "operators %", "tokens (model)", "speed-up", "draft µs", "with it", *PUBLISHED):  # fmt: skip
        first.add_column(column, justify="left" if column == "model" else "right")
    for row in overheads(results, drafts):
        drafting = row["speed_up_with_drafts"]
        first.add_row(
            row["model"], str(row["batch"]), str(row["length"]), str(row["nodes"]), f"{row['plain_us']:.0f}",
            f"{row['us']:.0f}", f"{row['overhead']:.3f}", *(f"{row['parts_percent'][p]:+.1f}" for p in PARTS),
            f"{row['operators_percent']:+.1f}", f"{row['tokens']:.2f}", f"{row['speed_up']:.2f}x",
            *(("", "") if drafting is None else (f"{row['draft_us']:.0f}", f"{drafting:.2f}x")),
            *(f"{row['published_speed_up'][k]:.2f}x" if row["published_speed_up"] else "" for k in PUBLISHED),
        )  # fmt: skip
    second = Table(title=f"size of tree that pays best | {title}")
    for column in ("model", "B", "L", "best nodes", "speed-up", "speed-up by nodes"):
        second.add_column(column, justify="left" if column == "model" else "right")
    tokens = TokenTree.search(HEAD_ACCURACIES, max(r.nodes for r in results)).expected_tokens(HEAD_ACCURACIES)
    for row in best_sizes(results):
        by_nodes = {n: float(tokens[n - 1]) * row["step_us"].get(1, us) / us for n, us in row["step_us"].items()}
        second.add_row(
            row["model"], str(row["batch"]), str(row["length"]), str(row["nodes"]), f"{row['speed_up'] or 0:.2f}x",
            "  ".join(f"{n}: {x:.2f}x" for n, x in sorted(by_nodes.items())),
        )  # fmt: skip
    third = Table(title=f"matmuls, µs | {title}")
    names = list(dict.fromkeys(chain(*(row["candidates_us"] for row in matmuls))))
    for column in ("model", "op", "rows", "weight", *names, "best"):
        third.add_column(column, justify="left" if column in ("model", "op", "best") else "right")
    for row in matmuls:
        times = (row["candidates_us"].get(name) for name in names)
        third.add_row(
            row["model"], row["op"], str(row["rows"]), "x".join(map(str, row["shape"])),
            *("" if us is None else f"{us:.1f}" for us in times), row["best"],
        )  # fmt: skip
    return [first, second, third]


def matmul_key(row: dict) -> tuple:
    """A gated one's times are with silu_mul; rows from before there was such a choice are all linears."""
    return list(MODELS).index(row["model"]), row["rows"], *row["shape"], row.get("op", "linear")


def merge_results(
    path: Path, results: Sequence[Measured], matmuls: Sequence[dict], drafts: Sequence[Drafted], limits: Limits
) -> list[Measured]:
    """These results, and what the file holds of others of the same card and versions; written."""
    card = {"device": limits.device, "torch": limits.torch, "triton": limits.triton}
    merged, chosen = {r.key: r for r in results}, {matmul_key(row): row for row in matmuls}
    drafted = {d.key: d for d in drafts}
    if path.exists():
        old = json.loads(path.read_text())
        if old["card"] == card:
            merged = {r.key: r for r in (Measured(**{"date": old["date"]} | row) for row in old["steps"])} | merged
            chosen = {matmul_key(row): row for row in old.get("matmuls", [])} | chosen
            drafted = {d.key: d for d in (Drafted(**row) for row in old.get("drafts", []))} | drafted
    every = sorted(merged.values(), key=lambda r: (list(MODELS).index(r.model), *r.key[1:]))
    content = {
        "date": datetime.date.today().isoformat(), "card": card,
        "limits": {k: v for k, v in vars(limits).items() if k not in card},
        "steps": [asdict(r) for r in every], "overheads": overheads(every, list(drafted.values())),
        "best_sizes": best_sizes(every), "matmuls": [chosen[key] for key in sorted(chosen)],
        "drafts": [asdict(drafted[key]) for key in sorted(drafted, key=lambda k: (list(MODELS).index(k[0]), *k[1:]))],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return every


def plot(path: Path, results: Sequence[Measured], limits: Limits, smoke: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.5))
    rows = overheads(results)
    for where in dict.fromkeys((r["model"], r["batch"], r["length"]) for r in rows):
        line = [(r["nodes"], r["overhead"]) for r in rows if (r["model"], r["batch"], r["length"]) == where]
        left.plot(*zip(*sorted(line)), "o-", label="{} B={} L={}".format(*where))
    left.set(xscale="log", xlabel="nodes", ylabel="step time over plain decoding's", title="overhead of a tree step")
    left.legend(fontsize=7)
    sizes = best_sizes(results)
    for where in dict.fromkeys((r["model"], r["length"]) for r in sizes):
        line = [(r["batch"], r["nodes"]) for r in sizes if (r["model"], r["length"]) == where]
        right.plot(*zip(*sorted(line)), "o-", label="{} L={}".format(*where))
    right.set(xscale="log", yscale="log", xlabel="batch", ylabel="nodes",
              title="size of tree with the most tokens a second")  # fmt: skip
    right.legend(fontsize=7)
    nodes, batches = (sorted({r[key] for r in [*rows, *sizes]}) for key in ("nodes", "batch"))
    for axis, ticks in ((left.xaxis, nodes), (right.xaxis, batches), (right.yaxis, nodes)):
        axis.set_ticks(ticks, map(str, ticks))
        axis.set_ticks([], minor=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{limits.device}, torch {limits.torch}, triton {limits.triton}" + (", smoke test on a CPU" if smoke else "")
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers >= 1, got {text}")
    return sorted(set(values))


def models(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(MODELS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=models, help=f"of {', '.join(MODELS)}; default: the three large ones")
    parser.add_argument("--batches", type=numbers, help="default: 1,4,16")
    parser.add_argument("--lengths", type=numbers, help="committed tokens; default: 512,1024,2048,4096,8192")
    parser.add_argument("--nodes", type=numbers, help="of trees; default: 16,26,64,128")
    parser.add_argument("--mode", choices=("greedy", "typical"), default="greedy", help="of acceptance")
    parser.add_argument("--replays", type=int, default=15, help="of each graph; the median counts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu: a smoke test on a tiny model")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results, nothing on a CPU")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    smoke = device.type != "cuda"
    args.models = args.models or (["tiny"] if smoke else [name for name in MODELS if name != "tiny"])
    args.batches = args.batches or ([1, 2] if smoke else [1, 4, 16])
    args.lengths = args.lengths or ([20] if smoke else [512, 1024, 2048, 4096, 8192])
    args.nodes = args.nodes or ([4, 9] if smoke else [16, 26, 64, 128])
    if min(args.nodes) < 2:
        parser.error("--nodes: 1 is plain decoding, which is measured in any case")
    if args.out is None and not smoke:
        args.out = Path(__file__).resolve().parent / "results"
    console = Console(width=None if Console().is_terminal else 220)
    limits = measure_limits(device, quick=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with torch.inference_mode():
        results, matmuls, drafts, wrong = measure_all(args, limits, device, say)
    if not results:
        return 1
    for table in tables(results, matmuls, drafts, limits, smoke):
        console.print(table)
    if args.out is not None:
        stem = args.out / f"{limits.slug}_step"
        every = merge_results(stem.with_suffix(".json"), results, matmuls, drafts, limits)
        plot(stem.with_suffix(".png"), every, limits, smoke)
        say(f"{stem}.json, .png")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
