"""Work that runs beside what follows it, in a step recorded for a GPU.

Two chains of short kernels that do not wait for each other fill the gaps in each other. Outside a recording the host would pay
more for the second stream than the GPU gains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_streams: dict[torch.device, torch.cuda.Stream] = {}


def beside(work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Begin `work(x)`; what is returned waits for its outcome and gives it. Keep `x` until then."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _recorded(x):
        done = work(x)
        return lambda: done
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)
    side = _streams[x.device]
    # Memory that the side stream gave back is used again behind this, when everything before has read what was in it.
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        found = work(x)

    def wait() -> Tensor:
        torch.cuda.current_stream(x.device).wait_stream(side)
        return found

    return wait


def _recorded(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
