"""Calls made again: a decoder makes the same call in every layer and step.

A call is known by its signature: all that its checks and launches look at, which is all of its tensors but the upper
bits of their addresses. What is kept by it is a function of the tensors' addresses, 0 for None, that makes the call
again, and says whether it did. Among a call's tensors there may be tuples and lists of them.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import _ops

Again = Callable[[list[int]], bool]
Tensors: TypeAlias = "tuple[Tensor | Sequence[Tensor | None] | None, ...]"

MAX_CALLS = 4096


class PythonCalls:
    """In Python: what csrc/fast_calls.cpp does in a tenth of the time."""

    def __init__(self):
        self._known: dict[tuple, Again] = {}

    def call(self, tensors: Tensors, options: tuple) -> bool | None:
        """Make the call again. Whether it was made; None where it is not known."""
        signature = _signature(tensors, options)
        if signature is None:
            return None
        again = self._known.get(signature[0])
        return None if again is None else again(signature[1])

    def find(self, tensors: Tensors, options: tuple) -> Again | None:
        signature = _signature(tensors, options)
        return None if signature is None else self._known.get(signature[0])

    def remember(self, tensors: Tensors, options: tuple, again: Again) -> None:
        signature = _signature(tensors, options)
        if signature is None:
            return
        if len(self._known) >= MAX_CALLS:
            self._known.clear()
        self._known[signature[0]] = again

    def clear(self) -> None:
        self._known.clear()

    def values(self) -> list[Again]:
        return list(self._known.values())


_TYPES = (Tensor, torch.nn.Parameter)  # no subclass, which may be anything


def _flat(tensors: Tensors) -> list:
    flat: list = []
    for x in tensors:
        flat.extend(x) if isinstance(x, (tuple, list)) else flat.append(x)
    return flat


def are_plain(tensors: Tensors) -> bool:
    """Whether they have addresses, and nothing has to see the operator."""
    return not traced() and all(x is None or (type(x) in _TYPES and not x.is_meta) for x in _flat(tensors))


def addresses(tensors: Tensors) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in _flat(tensors)]


def traced() -> bool:
    """Whether something has to see the operator: a compiler, a dispatch mode, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _signature(tensors: Tensors, options: tuple) -> tuple[tuple, list[int]] | None:
    """What they look like, and the addresses; None for what cannot be told by that."""
    flat = _flat(tensors)
    if not all(x is None or type(x) in _TYPES for x in flat):
        return None
    if not all(x is None or type(x) in (bool, int, float) for x in options):
        return None
    try:
        places = addresses(tensors)
    except RuntimeError:  # without an address
        return None
    nesting = tuple(len(x) if isinstance(x, (tuple, list)) else None for x in tensors)
    kinds = [
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, address % 16)
        for x, address in zip(flat, places)
    ]
    return (nesting, *kinds, *map(type, options), *options), places


class Launch:
    """A call made again by `function` of csrc, from its plan (csrc/plans.h).

    plan:    whose memory, at `address`, it is
    device:  a GPU's index, or -1
    """

    def __init__(self, function, plan, address: int, device: int):
        self.function, self.plan, self.address, self.device = function, plan, address, device

    @property
    def native(self) -> tuple[int, int, int]:
        """The function, its plan and its device: csrc/fast_calls.cpp makes the call by itself."""
        return ctypes.cast(self.function, ctypes.c_void_p).value or 0, self.address, self.device

    def __call__(self, addresses: list[int]) -> bool:
        stream = torch._C._cuda_getCurrentRawStream(self.device) if self.device >= 0 else None
        # Packed in a third of the time of an array of ctypes.
        error = self.function(self.address, struct.pack(f"{len(addresses)}Q", *addresses), stream)
        if error is not None:
            raise RuntimeError(error.decode())
        return True


def planned(name: str, arguments: tuple, device: torch.device) -> Launch:
    """A call of the operator `name` with checked arguments, planned by it."""
    on_cuda = device.type == "cuda"
    plan: Tensor = _ops.plan(name, on_cuda)(*arguments)
    return Launch(_ops.function(name, on_cuda), plan, plan.data_ptr(), device.index if on_cuda else -1)


def new_calls():
    """Compiled, where it was built and PyTorch has what it needs."""
    try:
        from ._fast_calls import Calls

        return Calls(Tensor.__dlpack_c_exchange_api__, *_TYPES)
    except (ImportError, AttributeError):
        return PythonCalls()
