"""Checkpoint files read piece by piece on their way to a GPU, so that CPU memory never holds more than the largest tensor.

transformers maps the files into memory. For a model that stays on the CPU that is right, for there the mapped tensors are the
model's; on the way to a GPU every page that was read would stay part of the process until the last tensor is loaded. It also
reads several tensors at once, in threads. Small ones may come at once here too, but the largest comes alone.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import LoadStateDictConfig


class Room:
    """Bytes of CPU memory that threads share: who takes more than are left waits."""

    def __init__(self, size: int):
        self._left, self._changed = size, threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: size <= self._left)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


class UnmappedSlice:
    """A tensor in a file, read when it is indexed, and on `place` when that returns; for the rest safetensors' own slice.

    Args:
        file: opened by safetensors.
        place: the device that the tensor is going to; None where this is not known.
    """

    def __init__(self, file: Any, name: str, place: torch.device | None):
        self._file, self._name, self._place, self._slice = file, name, place, file.get_slice(name)
        bits = re.search(r"\d+", self._slice.get_dtype())  # "BF16", "F8_E4M3"
        self.nbytes = math.prod(self._slice.get_shape()) * (int(bits[0]) if bits else 8) // 8
        self.room: Room | None = None  # where its place is known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Tensor:
        with nullcontext() if self.room is None else self.room.take(self.nbytes):
            # A slice is a copy of what was read, even where it is all of it.
            tensor = self._file.get_tensor(self._name) if index is ... else self._slice[index]
            return tensor if self._place is None else tensor.to(self._place)


def unmapped_slices(files: Sequence[str], load_config: LoadStateDictConfig) -> dict[str, UnmappedSlice] | None:
    """Slices by tensor name, each read from its file when it is asked for its values and not before.

    Args:
        files: safetensors files.
        load_config: how transformers is going to load them.

    Returns:
        None where some of the tensors are to stay on the CPU or on disk, or where nobody said where they are to go:
        transformers then opens the files itself.
    """
    places = {_as_device(place) for place in (load_config.device_map or {}).values()}
    if not places or load_config.disable_mmap or not all(map(_has_own_memory, places)):
        return None
    # Of several devices transformers alone knows which; it sends the tensors there itself, and up to four are read at once.
    place = places.pop() if len(places) == 1 else None
    slices = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        slices.update({name: UnmappedSlice(opened, name, place) for name in opened.keys()})  # noqa: SIM118
    if place is not None:
        room = Room(max((one.nbytes for one in slices.values()), default=0))
        for one in slices.values():
            one.room = room
    return slices


def _as_device(place: Any) -> torch.device | None:
    return None if place == "disk" else torch.device(place)


def _has_own_memory(place: torch.device | None) -> bool:
    return place is not None and place.type in ("cuda", "xpu", "meta")
