"""Work on tensors at fixed addresses, replayed as CUDA graphs: one launch for a whole decode step.

No compiler is involved: the first call of a step runs as it is, the second is recorded, the others replay the record. On
other devices, and where a model cannot be recorded, every call runs as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from ..kernels_hub import compile_ahead, registry

# Graphs of one cache: beyond these the one that was not used for longest is forgotten. Each way to sample has graphs of its own.
_MOST_GRAPHS = 64

_streams: dict[torch.device, torch.cuda.Stream] = {}


class _Pool:
    """Memory that graphs of one device share: they run one after another, and leave results only in buffers of their own.

    It lives as long as one of them. A handle whose graphs are all gone cannot be recorded into again while any tensor of its
    memory is left: torch ends with an internal error.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


_pools: weakref.WeakValueDictionary[torch.device, _Pool] = weakref.WeakValueDictionary()


def why_not_recorded(model: nn.Module, tokens: int) -> str | None:
    """Why steps of a model, of up to `tokens` tokens in all rows, cannot be recorded as CUDA graphs, or None if they can."""
    devices = {p.device for p in model.parameters()}
    if {d.type for d in devices} != {"cuda"}:
        return "its weights are not on a GPU"
    if len(devices) > 1:
        return f"its weights are spread over {len(devices)} GPUs"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "its weights are moved while it runs (offloading)"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantised layers wait for the host"
    kinds = (*model.config.layers_block_type, *(model.config.mtp_layers_block_type or ()))
    if tokens > registry.FLOAT32_TOKENS and model.dtype == torch.float32 and "moe" in kinds:
        return f"in float32 its experts wait for the host where a step has more than {registry.FLOAT32_TOKENS} tokens"
    return None


def state_of(model: nn.Module) -> tuple:
    """What a recorded step depends on besides its buffers: where weights lie, and how modules are set.

    A step that was recorded under another state must not be replayed: it would read freed memory, or leave out an adapter.
    """
    modules = []
    for module in model.modules():
        entry = (id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        if isinstance(getattr(module, "disable_adapters", None), bool):  # a layer of PEFT
            scaling = tuple(sorted(getattr(module, "scaling", {}).items()))
            entry += (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters), scaling)
        modules.append(entry)
    tensors = tuple((t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers()))
    return tuple(modules), tensors, tuple(sorted(registry._forced.items())), model.config._experts_implementation


class _Graph:
    """A recorded step."""

    def __init__(self, device: torch.device):
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self.pool = _pools.setdefault(device, _Pool())

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


def warm_up(device: torch.device, step: Callable[[], None]) -> None:
    """Run a step once on the stream of the recordings, so that kernels and libraries have made what they keep for it."""
    with torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        side, current = _streams[device], torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()
        current.wait_stream(side)


def record(device: torch.device, step: Callable[[], None]) -> _Graph:
    """Record a step that has been warmed up, without running it."""
    made = _Graph(device)
    with (
        torch.cuda.device(device),
        torch.cuda.graph(made._graph, made.pool.handle, _streams[device], capture_error_mode="thread_local"),
    ):
        step()
    return made


class CUDAGraphs:
    """The graphs of one cache, and the buffers that they read and write. A copy starts empty: graphs hold addresses."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.reason: str | None = "not bound to a model yet"
        self._device = torch.device("cpu")
        self.clear()

    def __deepcopy__(self, memo: dict) -> CUDAGraphs:
        return CUDAGraphs()

    def clear(self) -> None:
        """Forget every graph."""
        self._graphs: dict[Hashable, _Graph] = {}
        self._warm: set[Hashable] = set()
        self._state: tuple | None = None

    def bind(self, model: nn.Module, tokens: int) -> None:
        """Called before a loop of steps of up to `tokens` tokens: forget graphs of another state of the model."""
        self.reason, self._device = why_not_recorded(model, tokens), next(model.parameters()).device
        if self.reason is None:
            state = state_of(model)
            if state != self._state:
                self.clear()
                self._state = state

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that stays where it is from call to call; zeros at first."""
        found = self.buffers.get(name)
        if found is None or (found.shape, found.dtype, found.device) != (shape, dtype, device):
            if found is not None:
                self.clear()
            found = self.buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        return found

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step that works on fixed addresses only. Calls with equal `key` do the same to the same tensors."""
        if self.reason is not None or compile_ahead.active():
            step()
            return
        if key not in self._warm:
            warm_up(self._device, step)
            self._warm.add(key)
            return
        graph = self._graphs.pop(key, None) or record(self._device, step)
        graph.replay()
        self._graphs[key] = graph  # the last of them, as the newest in use
        if len(self._graphs) > _MOST_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest]
            self._warm.discard(oldest)

    def __len__(self) -> int:
        return len(self._graphs)
