"""Balanced experts without an auxiliary loss: count how many tokens each expert got, then move the router's correction
bias by a fixed step towards the average (the sign rule of Wang et al. 2024, "Auxiliary-loss-free load balancing").
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from ..modeling.latent_moe import NemotronHTopkRouter


class RouterLoads:
    """Counts tokens per expert in every router of a model, through forward hooks, until `close` is called.

    Counts add up over forward calls (gradient accumulation) until `reset`. Forwards repeated by gradient checkpointing
    are counted again; the sign rule does not mind, since all experts' counts double alike.
    """

    def __init__(self, model: nn.Module):
        self.routers = {name: m for name, m in model.named_modules() if isinstance(m, NemotronHTopkRouter)}
        self.counts: dict[str, Tensor] = {}
        self._hooks = [
            router.register_forward_hook(lambda module, args, output, name=name: self._count(name, module, output[2]))
            for name, router in self.routers.items()
        ]

    @torch.no_grad()
    def _count(self, name: str, router: NemotronHTopkRouter, index: Tensor) -> None:
        flat = index.reshape(-1)
        if name not in self.counts:
            self.counts[name] = torch.zeros(router.num_experts, dtype=torch.int64, device=flat.device)
        self.counts[name].scatter_add_(0, flat, torch.ones_like(flat))

    def reset(self) -> None:
        """Start counting afresh."""
        for count in self.counts.values():
            count.zero_()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def maximum_violation(self) -> dict[str, float]:
        """Per router, the busiest expert's load over the average, minus one: 0 is perfect balance."""
        return {name: float(c.max() / c.double().mean().clamp(min=1e-9) - 1) for name, c in self.counts.items()}

    def dead_experts(self) -> dict[str, int]:
        """Per router, how many experts got no token."""
        return {name: int((c == 0).sum()) for name, c in self.counts.items()}


@torch.no_grad()
def update_correction_bias(loads: RouterLoads, rate: float = 1e-3) -> None:
    """Move each router's `e_score_correction_bias` by `rate` towards balance, from counts summed over all ranks."""
    for name, count in loads.counts.items():
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
        load = count.float()
        loads.routers[name].e_score_correction_bias += rate * torch.sign(load.mean() - load)


class RouterBiasCallback(TrainerCallback):
    """Applies `update_correction_bias` after every optimizer step of a `Trainer`.

    Args:
        rate: step of the bias, 1e-3 in the release's pretraining.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate = rate
        self.loads: RouterLoads | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.loads = RouterLoads(model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        update_correction_bias(self.loads, self.rate)
        self.loads.reset()

    def on_train_end(self, args, state, control, **kwargs):
        self.loads.close()
