"""The compiled operators: loading them, what torch.compile needs to know of them, and what they were built with."""

import ctypes
import importlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

BUILD_COMMAND = "MEDUSA_KERNELS_BUILD=cuda pip install --no-build-isolation ."

_HERE = Path(__file__).parent
_load_errors: dict[str, str] = {}  # why a library that is there could not be loaded


def _load(name: str) -> bool:
    path = _HERE / f"{name}.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _load_errors[name] = str(error.__cause__ or error)
        return False
    return True


HAS_CPU_OPS = _load("_ops_cpu")  # and the schemas
HAS_CUDA_OPS = HAS_CPU_OPS and torch.version.cuda is not None and _load("_ops_cuda")


def op(name: str, on_cuda: bool) -> Any:
    """The compiled operator `medusa_kernels::name`; RuntimeError with the build command where it was not built."""
    if on_cuda:
        if not HAS_CUDA_OPS:
            raise RuntimeError(_missing(name, "CUDA", "_ops_cuda"))
    elif not HAS_CPU_OPS:
        raise RuntimeError(_missing(name, "C++", "_ops_cpu"))
    return _overload(name)


def plan(name: str, on_cuda: bool) -> Any:
    """The operator that plans a call of operator `name`, to make it again: csrc/plans.h."""
    op(name, on_cuda)
    return _overload(f"{name}_plan")


@cache
def function(name: str, on_cuda: bool) -> Any:
    """What makes a call of operator `name` from its plan: a function of plan, addresses and stream."""
    library = ctypes.PyDLL(str(_HERE / ("_ops_cuda.so" if on_cuda else "_ops_cpu.so")))
    result = library[f"medusa_kernels_{name}"]
    result.restype = ctypes.c_char_p
    result.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return result


@cache
def _overload(name: str) -> Any:
    overload = getattr(torch.ops.medusa_kernels, name).default
    return getattr(overload, "_op", overload)  # what the overload calls, with its arguments packed once more


def _missing(name: str, what: str, library: str) -> str:
    why = _load_errors.get(library, "it was not built")
    return (
        f"{name} needs medusa_kernels' {what} operators ({library}.so: {why}). Build them with\n    {BUILD_COMMAND}\n"
        f"or call medusa_kernels.reference.{name}, which is eager PyTorch and slow."
    )


def reraise(error: Exception) -> NoReturn:
    """Raise what an operator raised; a ValueError where it says so, which C++ cannot raise itself (csrc/checks.h)."""
    prefix, _, text = str(error).partition("ValueError: ")
    if isinstance(error, RuntimeError) and not prefix and text:
        raise ValueError(text.splitlines()[0]) from None
    raise error


def build_info() -> dict[str, object]:
    """Versions, and what was built: a dict of

    version, torch, triton: str;  cpu_ops, cuda_ops: bool, whether the operators are loaded;
    and of the build, None where nothing was built: built_with_torch, torch_target (the oldest torch that the binary
    runs on), cxx, nvcc: str;  cuda_archs: list of str, the last also as PTX.
    """
    try:
        version = importlib.metadata.version("medusa_kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    info: dict[str, object] = {
        "version": version,
        "torch": torch.__version__,
        "triton": triton,
        "cpu_ops": HAS_CPU_OPS,
        "cuda_ops": HAS_CUDA_OPS,
        "built_with_torch": None,
        "torch_target": None,
        "cxx": None,
        "nvcc": None,
        "cuda_archs": [],
    }
    if not (_HERE / "_ops_cpu.so").exists():
        return info
    try:
        built = importlib.import_module("medusa_kernels._build_info")
    except ImportError:  # built for another Python
        return info
    info["built_with_torch"], info["torch_target"], info["cxx"] = built.torch_version, built.torch_target, built.cxx
    info["nvcc"] = built.nvcc_version or None
    info["cuda_archs"] = built.cuda_archs.split(";") if built.cuda_archs else []
    return info


if HAS_CPU_OPS:

    @torch.library.register_fake("medusa_kernels::compact_kv_cache")
    def _(
        kv: list[Tensor],
        lead_dims: int,
        path: Tensor,
        accept_length: Tensor,
        cache_seqlens: Tensor,
        block_table: Tensor | None,
    ) -> None:
        tensors = {
            "path": path,
            "accept_length": accept_length,
            "cache_seqlens": cache_seqlens,
            "block_table": block_table,
            **{f"kv (tensor {i})": x for i, x in enumerate(kv)},
        }
        for name, x in tensors.items():
            if x is not None and x.device != kv[0].device:
                raise ValueError(f"{name}: expected a tensor on {kv[0].device}, got one on {x.device}")

    @torch.library.register_fake("medusa_kernels::accept_candidates")
    def _(
        logits: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor | None, max_depth: int, numbers: list[float],
        values: list[Tensor] | None, *others: Any,
    ) -> Any:  # fmt: skip
        # Also what runs when one tensor of an eager call is on the meta device.
        tensors = (tokens, parents, num_nodes, *(values or ()), *others)
        if any(isinstance(x, Tensor) and x.device != logits.device for x in tensors):
            raise RuntimeError(f"accept_candidates: expected all tensors on {logits.device}")
        batch = logits.shape[0]
        each, path = (batch,), (batch, max_depth + 1)
        ints = [logits.new_empty(shape, dtype=torch.int32) for shape in (each, path, each)]
        longs = [logits.new_empty(shape, dtype=torch.int64) for shape in (path, each)]
        return (*ints, *longs, logits.new_empty(each, dtype=torch.bool))

    @torch.library.register_fake("medusa_kernels::finish_step")
    def _(
        accept_length: Tensor, last_node: Tensor, tokens: Tensor, next_token: Tensor, finished: Tensor, *_: Any
    ) -> Any:  # fmt: skip
        return tokens.new_empty(tokens.shape[0], tokens.shape[1] + 1), torch.empty_like(finished)
