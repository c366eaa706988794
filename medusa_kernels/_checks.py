"""Checks of arguments, made once at the public functions: never a value on the device, always by name."""

import os

import torch
from torch import Tensor

_environ: dict = os.environ._data  # type: ignore[attr-defined]  # os.environ.get takes longer than a call's checks
_DEBUG = os.environ.encodekey("MEDUSA_KERNELS_DEBUG")


def debug_enabled() -> bool:
    """Whether MEDUSA_KERNELS_DEBUG=1 asks for checks that read values back from the device."""
    value = _environ.get(_DEBUG)
    return value is not None and os.environ.decodevalue(value) not in ("", "0")


def check_tensor(
    name: str,
    x: object,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    last_dim_contiguous: bool = False,
    contiguous: bool = False,
) -> Tensor:
    """Raise if `x` is not a tensor of that shape (None: any size), dtype and device; return it.

    TypeError for what is not a tensor, ValueError for everything else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {x.dtype}")
    if shape is not None and x.shape != shape:
        if x.dim() != len(shape):
            raise ValueError(f"{name}: expected {len(shape)} dimensions {_show(shape)}, got shape {tuple(x.shape)}")
        if any(want is not None and want != got for want, got in zip(shape, x.shape)):
            raise ValueError(f"{name}: expected shape {_show(shape)}, got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    if last_dim_contiguous and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {x.stride()}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
    return x


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
