"""Launches made once through Triton's own way, and again without it.

Triton binds and specialises each argument of each launch: 60 of them take longer than the kernel. `Launcher` makes the
launches of one call that way and keeps what came of it; `Replay` makes them again with other addresses. Whoever keeps a
`Replay` must tell apart all that Triton specialises on: shapes, strides, dtypes, the device, addresses modulo 16.
"""

from collections.abc import Iterable
from operator import itemgetter

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)  # CompiledKernel.run has this form


def launch(kernel, grid: tuple[int, ...], *args, **constants):
    """Launch through Triton: run-time arguments by position, constants and options by name."""
    return kernel[grid](*args, **constants)


# What was set in Triton at run time, so other than by the environment: it may change what is compiled.
_SETTINGS = knobs.runtime.__dict__, knobs.compilation.__dict__


def _hooks() -> tuple:
    """What a profiler asked to be called at each launch: lists, empty without one."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return tuple(getattr(hook, "calls", () if hook is None else (hook,)) for hook in hooks)


class Replay:
    """The launches of one call, compiled, with all arguments but addresses."""

    def __init__(self, steps: list[tuple], work_bytes: int, device: torch.device):
        self.steps, self.work_bytes, self.device = steps, work_bytes, device
        self.runtime, self.compilation = map(dict, _SETTINGS)
        self.on_enter, self.on_exit = _hooks()
        self.get_device, self.get_stream = driver.active.get_current_device, driver.active.get_current_stream
        self.index = self.get_device()

    def __call__(self, addresses: list[int]) -> bool:
        """Launch with the tensors at these addresses, 0 for None; False, and nothing done, where Triton must do it."""
        if self.get_device() != self.index:
            with torch.cuda.device(self.index):
                return self(addresses)
        if _SETTINGS != (self.runtime, self.compilation) or self.on_enter or self.on_exit:
            return False
        if self.work_bytes:
            work = torch.empty(self.work_bytes, dtype=torch.uint8, device=self.device)
            addresses = [*addresses, work.data_ptr()]
        stream = self.get_stream(self.index)
        for run, grid, function, metadata, constants, inside, pick in self.steps:
            values = [*addresses, *constants, *(addresses[source] + offset for source, offset in inside)]
            run(*grid, stream, function, metadata, None, None, None, *pick(values))
        return True


class Launcher:
    """Makes the launches of one call, in place of `launch`, on the aliases that it makes of the call's tensors; any
    other tensor is room to work in, and all of it one storage."""

    def __init__(self, tensors: Iterable[Tensor | None]):
        # Two arguments may be one tensor now and two another time: aliases tell them apart.
        self.tensors = [None if x is None else x.detach() for x in tensors]
        self._work: Tensor | None = None
        self._steps: list[tuple] = []
        self._repeatable = _KNOWN and not any(_hooks())

    def __call__(self, kernel, grid: tuple[int, ...], *args, **constants) -> None:
        compiled = launch(kernel, grid, *args, **constants)
        self._repeatable &= isinstance(compiled, CompiledKernel)  # not so under the interpreter
        if not self._repeatable:
            return
        args += tuple(constants[name] for name in kernel.arg_names[len(args) :])
        # Each argument's place among the addresses of the call's tensors and of the work, the constants, and addresses
        # inside of the work.
        fixed: list = []
        inside, places = [], []
        for arg in args:
            if not isinstance(arg, Tensor):
                places.append(("fixed", len(fixed)))
                fixed.append(arg)
                continue
            source, offset = self._find(arg)
            if offset == 0:
                places.append(("address", source))
            else:
                places.append(("inside", len(inside)))
                inside.append((source, offset))
        self._steps.append((compiled, (*grid, 1, 1)[:3], fixed, inside, places))

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        for i, x in enumerate(self.tensors):
            if x is tensor:
                return i, 0
        if self._work is None:
            self._work = tensor
        assert tensor.untyped_storage().data_ptr() == self._work.untyped_storage().data_ptr()
        return len(self.tensors), tensor.data_ptr() - tensor.untyped_storage().data_ptr()

    def replay(self) -> Replay | None:
        """For the same call on other tensors; None where only Triton's own way will do."""
        if not self._repeatable:
            return None
        work = self._work
        addresses = len(self.tensors) + (work is not None)
        steps = []
        for compiled, grid, fixed, inside, places in self._steps:
            start = {"address": 0, "fixed": addresses, "inside": addresses + len(fixed)}
            pick = itemgetter(*(start[kind] + i for kind, i in places))
            steps.append((compiled.run, grid, compiled.function, compiled.packed_metadata, fixed, inside, pick))
        device = next(x.device for x in self.tensors if x is not None)
        return Replay(steps, 0 if work is None else work.untyped_storage().nbytes(), device)
