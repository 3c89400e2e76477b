"""Prompts and rules for generation, and what a CUDA graph does, on a CPU.

`replayed` records the operators of a step with their tensors and runs them again on the same ones. A step that depends on a
number that only the host has, or that moves a tensor, gives something else when replayed.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from nemotron_super.modeling import cuda_graphs, latent_moe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


def _prompts(rows, length, padding, seed):
    """Left-padded prompts: ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : int(torch.randint(0, length, (1,), generator=generator)) if padding else 0] = 0
    return ids.masked_fill(mask == 0, 0), mask


class StopAfter(StoppingCriteria):
    """Stops a row when two given tokens follow each other, as a stop string does."""

    def __init__(self, pair):
        self.pair = torch.tensor(pair)

    def __call__(self, input_ids, scores, **kwargs):
        return (
            (input_ids[:, -2:] == self.pair).all(-1) if input_ids.shape[1] > 1 else torch.zeros(len(input_ids)).bool()
        )


class Forbid(LogitsProcessor):
    """Forbids what the newest token and the length say: shows whether processors see the right tokens."""

    def __call__(self, input_ids, scores):
        banned = (input_ids[:, -1:] * 7 + input_ids.shape[1]) % scores.shape[-1]
        return scores.scatter(1, banned, -torch.inf)


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.parts, self.ended, self.mtp_statistics = [], False, None

    def put(self, value):
        self.parts.append(value.reshape(-1))

    def end(self):
        self.ended = self.mtp_statistics is not None


# Operators whose result the host has to wait for: a value, or a shape that depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "equal", "is_nonzero", "bincount")


class NoWaiting(TorchDispatchMode):
    """Fails where the host would have to wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == waits or name.startswith(f"{waits}_") for waits in WAITS), f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


class Recording(NoWaiting):
    """Records every operator below it, undoes what they wrote, and computes anew into the same tensors on `replay`."""

    def __init__(self, step):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple] = []
        numbers = torch.get_rng_state()
        with self:
            step()
        torch.set_rng_state(numbers)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.clone()) for t in tree_leaves(written) if torch.is_tensor(t)]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def dense_experts(x, index, weights, up, down):
    """Routed experts without the host, which on a CPU visits one expert after another: chosen weights are gathered."""
    hidden = torch.einsum("ti,tkhi->tkh", x, up[index]).relu().square()
    return torch.einsum("tkh,tkoh,tk->to", hidden, down[index], weights.to(x.dtype))


def chance_that_two_samples_differ_so(first, second):
    """p of Pearson's chi-square for two samples (draws, tokens) of equal size; rare outcomes count as one."""
    _, outcome = torch.cat([first, second]).unique(dim=0, return_inverse=True)
    counts = torch.stack(
        [torch.bincount(part, minlength=int(outcome.max()) + 1) for part in outcome.chunk(2)]
    ).double()
    rare = counts.sum(0) < 10
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], 1)
    expected = counts.mean(0)  # half of both samples is what each is expected to hold
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = ((expected > 0).sum() - 1).double()
    return float(1 - torch.special.gammainc(freedom / 2, statistic / 2))


class ReplayedOnCPU:
    """Makes steps that are recorded and replayed on a GPU do so on a CPU; `counts` says how often."""

    def __init__(self, patch):
        self.counts: Counter[str] = Counter()
        patch.setattr(cuda_graphs, "why_not_recorded", lambda *args: None)
        patch.setattr(cuda_graphs, "warm_up", self.warm_up)
        patch.setattr(cuda_graphs, "record", self.record)
        patch.setattr(latent_moe, "moe_experts", dense_experts)

    def warm_up(self, device, step):
        self.counts["warm"] += 1
        with NoWaiting():
            step()

    def record(self, device, step):
        self.counts["recorded"] += 1
        return Recording(step)


@pytest.fixture(scope="session")
def prompts():
    """`prompts(rows, length, padding, seed)`: left-padded ids and their mask."""
    return _prompts


@pytest.fixture(scope="session")
def rules():
    """`StopAfter`, a stopping rule; `Forbid`, a logits processor; `Recorder`, a streamer."""
    return SimpleNamespace(StopAfter=StopAfter, Forbid=Forbid, Recorder=Recorder)


@pytest.fixture(scope="session")
def chance_of_difference():
    """`chance_of_difference(first, second)`: how likely two samples of one distribution differ as much."""
    return chance_that_two_samples_differ_so


@pytest.fixture(scope="session")
def no_waiting():
    """`with no_waiting(): ...` fails where the host would have to wait for a GPU."""
    return NoWaiting


@pytest.fixture(scope="module")
def replayed():
    """Steps are recorded and replayed, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        yield ReplayedOnCPU(patch)
