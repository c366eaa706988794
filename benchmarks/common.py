"""What every benchmark shares: the card's limits, timing with a cold cache, one result a (case, contender)."""

import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python benchmarks/run.py` without an install

IDLE_S = 0.1  # of the card before a contender is timed

Call = Callable[[], object]


class Unsupported(Exception):
    """This contender cannot do this case, or is not installed; the message says why."""


def import_peer(module: str, device: torch.device) -> ModuleType:
    """A peer's module; Unsupported without a GPU, or where it is not installed."""
    if device.type != "cuda":
        raise Unsupported("needs a GPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"not installed ({error})") from None


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


@dataclass(frozen=True)
class Limits:
    """What this card reaches, measured in this run; on a CPU nothing is measured, as its times mean nothing here."""

    device: str
    torch: str
    triton: str
    read_tb_s: float
    matmul_tflop_s: float
    launch_us: float
    l2_bytes: int

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def floor_us(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.read_tb_s, flops / self.matmul_tflop_s) * 1e-6


@dataclass
class Result:
    """One contender on one case. `status`: ok, wrong, unsupported, failed; only what is ok has times."""

    case: str
    contender: str
    status: str
    note: str = ""
    same_work: bool = True  # False: it does less (no mask, argmax alone): shown, never in a ratio
    in_graph: bool = True
    us: float | None = None
    host_us: float | None = None
    error: float | None = None
    num_bytes: float = 0.0
    flops: float = 0.0
    floor_us: float | None = None

    def as_json(self) -> dict:
        row = asdict(self)
        if self.us:
            row |= {"tb_s": self.tb_s, "tflop_s": self.tflop_s, "fraction_of_floor": self.fraction}
        return row

    @property
    def tb_s(self) -> float:
        return self.num_bytes / self.us * 1e-6

    @property
    def tflop_s(self) -> float:
        return self.flops / self.us * 1e-6

    @property
    def fraction(self) -> float | None:
        return self.floor_us and self.floor_us / self.us


@dataclass
class Prepared:
    """A contender made ready for a case: one call for each of the rotated sets of inputs.

    `check` gets a set's index and returns the error and whether that is right; `prologue` runs once a graph.
    """

    calls: Sequence[Call]
    check: Callable[[int], tuple[float, bool]]
    same_work: bool = True
    in_graph: bool = True
    prologue: Call | None = None


class Pool:
    """Random bf16 numbers, filled once; cases take their inputs from it as views, so that a case costs no set-up."""

    def __init__(self, numel: int, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        generator = torch.Generator(device).manual_seed(0)
        if device.type == "cuda":
            self.data = torch.randn(numel, device=device, dtype=dtype, generator=generator)
        else:
            self.data = torch.randn(numel, generator=generator).to(dtype)
        self.used = 0

    def reset(self) -> None:
        self.used = 0

    def take(self, *shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        start = self.used
        if start + numel > self.data.numel():
            raise ValueError(f"pool: {start + numel} numbers asked of {self.data.numel()}")
        self.used += -(-numel // 128) * 128  # 256-byte alignment
        return self.data[start : start + numel].view(shape)


def num_sets(bytes_per_set: float, l2_bytes: int, most: int = 256) -> int:
    """Sets of inputs to rotate over, so that what a call reads was pushed out of the L2 by the calls before it."""
    return int(min(most, max(2, -(-3 * l2_bytes // max(int(bytes_per_set), 1)))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(calls: Sequence[Call], prologue: Call | None = None) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; they have run before, so nothing compiles in the capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if prologue is not None:
            prologue()
        for call in calls:
            call()
    return graph


def graph_us(calls: Sequence[Call], prologue: Call | None = None, replays: int = 20, min_calls: int = 8) -> float:
    """Median of replays of one graph, in µs a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, -(-min_calls // len(calls)))
    graph = capture(list(calls) * rounds, prologue)
    for _ in range(2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events)]
    del graph
    return statistics.median(times) * 1e3 / (len(calls) * rounds)


def eager_us(calls: Sequence[Call], device: torch.device, seconds: float = 0.05, most: int = 50) -> float:
    """Median wall-clock µs of a call, the device waited for after each: for what cannot be captured, and on a CPU."""
    calls[0]()
    synchronize(device)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < until and len(times) < most):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def host_us(calls: Sequence[Call], device: torch.device, bursts: int = 40, burst: int = 10) -> float:
    """µs of the CPU's time for one eager call, the device not waited for: the median of short bursts, so that no queue
    of launches fills up, after one to warm up."""
    times = []
    for _ in range(bursts + 1):
        synchronize(device)
        start = time.perf_counter()
        for i in range(burst):
            calls[i % len(calls)]()
        times.append((time.perf_counter() - start) / burst)
    synchronize(device)
    return statistics.median(times[1:]) * 1e6


def measure(
    case: str, contender: str, prepare: Callable[[], Prepared], limits: Limits, num_bytes: float, flops: float,
    device: torch.device, replays: int = 20,
) -> Result:  # fmt: skip
    """Prepare a contender, check it on the first and the last set, and time it if it is right."""
    result = Result(case, contender, "ok", num_bytes=num_bytes, flops=flops)
    if device.type == "cuda":
        result.floor_us = limits.floor_us(num_bytes, flops)
    try:
        prepared = prepare()
        result.same_work, result.in_graph = prepared.same_work, prepared.in_graph and device.type == "cuda"
        checks = [prepared.check(i) for i in sorted({0, len(prepared.calls) - 1})]
        result.error = max(error for error, _ in checks)
        if not all(right for _, right in checks):
            result.status = "wrong"
            result.note = f"error {result.error:.1e}"
            return result
        if device.type == "cuda":
            result.host_us = host_us(prepared.calls, device)
            time.sleep(IDLE_S)  # a card that the contender before has heated runs slower
        if result.in_graph:
            result.us = graph_us(prepared.calls, prepared.prologue, replays)
        else:
            result.us = eager_us(prepared.calls, device)
    except Unsupported as reason:
        result.status, result.note = "unsupported", str(reason)
    except Exception as error:  # a contender that breaks is a result too; a broken device breaks all that follow
        result.status, result.note = "failed", first_line(error)
        result.us = None
    return result


def measure_cases(
    bench: ModuleType, cases: Sequence, contenders: Sequence[str], limits: Limits, device: torch.device, replays: int,
    report: Callable[[Result], None],
) -> list[Result]:  # fmt: skip
    """Each contender on each case of an operator's module, which has CONTENDERS, pool_numel and make_inputs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pool = Pool(bench.pool_numel(cases, limits.l2_bytes), device, dtype)
    results = []
    for case in cases:
        inputs = bench.make_inputs(case, pool, limits.l2_bytes)
        for name in contenders:
            prepare = partial(bench.CONTENDERS[name], inputs)
            results.append(measure(case.name, name, prepare, limits, case.num_bytes, case.flops, device, replays))
            report(results[-1])
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


@triton.jit
def empty_kernel(x_ptr):
    pass


def measure_limits(device: torch.device, quick: bool = False) -> Limits:
    """Read bandwidth by summing a buffer far larger than the L2, rate of an 8192^3 bf16 matmul, an empty launch."""
    if device.type != "cuda":
        return Limits("cpu", torch.__version__, triton.__version__, 0.0, 0.0, 0.0, 1 << 16)
    properties = torch.cuda.get_device_properties(device)
    replays = 5 if quick else 20
    # fp32 sums read 1 GiB: the fastest of several shapes of reduction, as none of them is the limit by design.
    buffer = torch.empty(1 << 28, device=device, dtype=torch.float32).normal_()
    read = 0.0
    for rows in (1 << 10, 1 << 12, 1 << 14):
        view = buffer.view(rows, -1)
        us = graph_us([partial(view.sum, 1)], replays=replays, min_calls=4)
        read = max(read, buffer.nbytes / us * 1e-6)
    # A copy counts bytes read and written.
    half = buffer.numel() // 2
    us = graph_us([partial(buffer[:half].copy_, buffer[half:])], replays=replays, min_calls=4)
    read = max(read, buffer.nbytes / us * 1e-6)
    del buffer, view
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    us = graph_us([lambda: a @ b], replays=replays, min_calls=4)
    matmul = 2 * 8192**3 / us * 1e-6
    launch = graph_us([lambda: empty_kernel[(1,)](a)], replays=replays, min_calls=64)
    return Limits(
        properties.name, torch.__version__, triton.__version__, read, matmul, launch, properties.L2_cache_size
    )


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; NaN counts as infinite."""
    out, reference = out.double(), reference.double()
    error = float((out - reference).norm() / reference.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def best_peer(results: Sequence[Result], ours: str = "ours") -> Result | None:
    """The fastest contender that is not ours and does the same work."""
    rivals = [r for r in results if r.us and r.same_work and not r.contender.startswith(ours)]
    return min(rivals, key=lambda r: r.us, default=None)
