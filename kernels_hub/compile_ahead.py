"""Kernels compiled before a call that launches them, all at once: it then waits as long as the slowest takes, not for their sum.

Triton compiles a kernel when it is first launched, and the launch waits. Inside `compiling_ahead` bundled kernels are compiled by
threads and not launched, and the code goes on. What a kernel would have written holds zeros, so that no index made of it lies out of
bounds. Whoever goes through a call in this way must throw away what it computes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .registry import BUNDLED

# Beyond these, threads wait for Python's lock: compiling begins with a kernel's source, in Python.
_MOST_THREADS = 16

_here = threading.local()
_users = 0  # threads inside `compiling_ahead`
_lock = threading.Lock()

_ZEROS: dict[Callable, Callable] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    Tensor.new_empty: Tensor.new_zeros,
}


class _Zeros(TorchFunctionMode):
    """Memory that a kernel was to fill."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _ZEROS.get(func, func)(*args, **(kwargs or {}))


def available() -> bool:
    """Whether there are kernels to compile: where Triton is missing, or torch knows no CUDA, none have been imported."""
    return BUNDLED in sys.modules


def active() -> bool:
    """Whether this thread is inside `compiling_ahead`."""
    return getattr(_here, "active", False)


def _bundled_kernels() -> Iterator[Any]:
    from triton import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith(BUNDLED):
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))


def _only_compile(run: Callable) -> Callable:
    def instead(*args: Any, warmup: bool, **named: Any) -> Any:
        return run(*args, warmup=warmup or active(), **named)

    return instead


@contextlib.contextmanager
def _not_launched() -> Iterator[None]:
    """Inside, a launch by a thread that is `active` compiles and does no more."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for kernel in _bundled_kernels():
                kernel.run = _only_compile(type(kernel).run.__get__(kernel))
    _here.active = True
    try:
        yield
    finally:
        _here.active = False
        with _lock:
            _users -= 1
            if _users == 0:
                for kernel in _bundled_kernels():
                    vars(kernel).pop("run", None)


def _ready(kernel: Any) -> Any:
    kernel.run  # noqa: B018 -- a property: makes the launcher, for which a C compiler takes as long as the kernel took, and loads both
    return kernel


@contextlib.contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Inside, bundled kernels that this thread launches are compiled for `device`, a GPU, and not run; leaving waits for all.

    A kernel that cannot be compiled is left to its launch, which says why.
    """
    from triton import AsyncCompileMode

    class Mode(AsyncCompileMode):
        def submit(self, key: Any, compile_fn: Callable, finalize_fn: Callable) -> Any:
            return super().submit(key, lambda: _ready(compile_fn()), finalize_fn)

    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,)) as pool,
        Mode(pool, ignore_errors=True),
        _not_launched(),
        _Zeros(),
    ):
        yield
