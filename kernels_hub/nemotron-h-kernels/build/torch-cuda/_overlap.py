"""Programmatic dependent launch, from Hopper on: a kernel begins while the one before it in the stream still runs.

Decoding is a chain of some hundred short kernels, each of which would wait for the last program of the one before, then for
its own launch, then for its first bytes. A kernel launched with `**overlap(x)` does the last two meanwhile. It has two rules:

- Before `previous_done` it reads nothing but weights: then all kernels before it have ended, and not earlier. A weight
  must therefore not be what another of these kernels has written just before. It may `prefetch` whatever it will read, states
  too: lines wait in the L2 cache, which every later write goes to, and are loaded from there afterwards.
- Every program calls it, also one with nothing to do. A kernel whose programs left without would seem to have ended while
  its predecessor still runs.

Short kernels let the next one begin at once (`next_may_begin` first): what a launch takes is longer than they are. Kernels that
fill the GPU do so when their work is done: programs of the next that came early would lie where there was room, which is not
evenly, and all of it would wait for the fullest multiprocessor.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import gpu


@functools.cache
def _options(device: torch.device) -> dict[str, bool]:
    able = device.type == "cuda" and gpu(device)[1] >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}


def overlap(x: Tensor) -> dict[str, bool]:
    """What a launch on the device of `x` takes beside its arguments; the kernel has a constant `OVERLAP`."""
    return _options(x.device)


@triton.jit
def previous_done(OVERLAP: tl.constexpr):
    """Wait until the previous kernel has ended and what it wrote is there."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def next_may_begin(OVERLAP: tl.constexpr):
    """Let the next kernel begin once every program has called this or ended."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers, OVERLAP: tl.constexpr):
    """Ask for the lines of 128 bytes that these pointers lie in, to be in the L2 cache when they are loaded."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
