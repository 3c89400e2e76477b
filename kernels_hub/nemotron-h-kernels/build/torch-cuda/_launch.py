"""What every launch needs: the device of its tensors and what it is, sizes of grids and blocks, and rows without gaps."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)
_HERE = contextlib.nullcontext()


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Launch where `x` lies: Triton takes the current device, whatever its arguments are on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


@functools.cache
def gpu(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability, asked for once; of a CPU, which interprets kernels, one and Hopper's."""
    if device.type != "cuda":
        return 1, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


# Plain arithmetic: Triton's functions of these names can be called by kernels too, which costs the host microseconds a call.


def cdiv(size: int, by: int) -> int:
    """How many blocks of `by` hold `size`."""
    return -(-size // by)


def power_of_2(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def block(size: int, least: int = 16) -> int:
    """The next power of two, and no less than `least` (tensor cores want 16)."""
    return max(least, power_of_2(size))


def empty_like(x: Tensor) -> Tensor:
    """Room for a tensor of the shape and dtype of x, without gaps. `torch.empty` takes the host thrice the time with all it is told."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense(x: Tensor) -> Tensor:
    """The tensor itself wherever its last dimension lies without gaps, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """(..., width) as (rows, width) with dense rows; a view wherever strides allow, such as a slice of a projection."""
    return dense(x).reshape(-1, x.shape[-1])
