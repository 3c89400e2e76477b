"""Balanced experts: count how many tokens each expert got, then move the router's correction bias by a fixed step towards
the average (the sign rule of Wang et al. 2024, "Auxiliary-loss-free load balancing").

    bias_e += rate * sign(mean load - load_e)

Beside it, weakly, the sequence-level loss of DeepSeek-V3 (equations 17 to 20), which keeps single sequences from leaning on
few experts. For a row of T tokens with top-k of E experts and sigmoid scores s:

    f_e = E / (k T) * tokens of e,   P_e = mean over tokens of s_e / sum(s),   loss = coefficient * sum over e of f_e P_e
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from ..modeling.first_call import real_calls_only
from ..modeling.latent_moe import NemotronHTopkRouter
from ..modeling.modeling_nemotron_h import NemotronHModel


class _AddGradient(torch.autograd.Function):
    """Passes `through` on; the backward adds `scale * d loss` to its gradients, as if the loss had been added up."""

    @staticmethod
    def forward(ctx, through: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return through.view_as(through)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.full_like(ctx.saved_tensors[0], ctx.scale), None


def sequence_balance_loss(logits: Tensor, index: Tensor, rows: int, real: Tensor | None = None) -> Tensor:
    """Sequence-level balance loss of one router, mean over rows, before its coefficient; 1 for uniform routing.

    Args:
        logits: (rows * seq, experts) float32, the router's.
        index: (rows * seq, top_k) int64, the experts chosen.
        rows: how many sequences there are; documents packed into one row count together.
        real: (rows, seq) bool, False for padding.
    """
    scores = logits.sigmoid()
    share = (scores / scores.sum(-1, keepdim=True)).view(rows, -1, logits.shape[-1])
    chosen = index.view(rows, -1, index.shape[-1])
    seen = torch.ones_like(chosen, dtype=scores.dtype)
    tokens = torch.full((rows, 1), float(chosen.shape[1]), device=logits.device)
    if real is not None:
        seen = seen * real.unsqueeze(-1)
        share = share * real.unsqueeze(-1)
        tokens = real.sum(1, keepdim=True).clamp(min=1).to(scores.dtype)
    load = torch.zeros(rows, logits.shape[-1], dtype=scores.dtype, device=logits.device)
    load.scatter_add_(1, chosen.flatten(1), seen.flatten(1))
    load = load * logits.shape[-1] / (index.shape[-1] * tokens)
    return (load * share.sum(1) / tokens).sum(1).mean()


@dataclass
class LoadStatistics:
    """How evenly one router spread its tokens.

    Attributes:
        maximum_violation: the busiest expert's load over the average, minus one: 0 is perfect balance.
        entropy: of the experts' shares, over its largest value: 1 is perfect balance.
        dead_experts: how many experts got no token.
    """

    maximum_violation: float
    entropy: float
    dead_experts: int

    @classmethod
    def of(cls, count: Tensor) -> LoadStatistics:
        """From tokens per expert (experts,)."""
        load = count.double()
        share = load / load.sum().clamp(min=1)
        entropy = torch.special.entr(share).sum() / torch.tensor(float(max(2, len(load)))).log()
        violation = load.max() / load.mean().clamp(min=1e-9) - 1
        return cls(float(violation), float(entropy), int((count == 0).sum()))


class RouterLoads:
    """Counts tokens per expert in every router of a model, through forward hooks, until `close` is called.

    Counts add up over forward calls (gradient accumulation) until `reset`; padding is not counted. Forwards repeated by
    gradient checkpointing are counted again; the sign rule does not mind, since all experts' counts double alike.

    Args:
        model: any module that holds routers, wrapped or not.
        coefficient: of the sequence-level balance loss, whose gradient is added while training; 0 for none.
        training_only: leave forwards in eval mode uncounted.

    Attributes:
        counts: per router, (experts,) int64, there from the start, so that all ranks hold the same set.
        gradient_scale: what the balance loss' gradient is multiplied with; 1 / accumulation steps.
    """

    def __init__(self, model: nn.Module, coefficient: float = 0.0, training_only: bool = False):
        self.routers = {name: m for name, m in model.named_modules() if isinstance(m, NemotronHTopkRouter)}
        self.coefficient, self.training_only, self.gradient_scale = coefficient, training_only, 1.0
        self.counts: dict[str, Tensor] = {
            name: torch.zeros(router.num_experts, dtype=torch.int64, device=router.e_score_correction_bias.device)
            for name, router in self.routers.items()
        }
        self._losses: list[Tensor] = []
        self._rows, self._real = 1, None
        self._hooks = [
            router.register_forward_hook(
                real_calls_only(lambda module, args, output, name=name: self._see(name, module, output))
            )
            for name, router in self.routers.items()
        ]
        self._hooks += [
            module.register_forward_pre_hook(real_calls_only(self._note_rows), with_kwargs=True)
            for module in model.modules()
            if isinstance(module, NemotronHModel)
        ]

    def _note_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Routers see tokens without their rows: keep how many rows there are, and which tokens are padding."""
        layout, embeds = kwargs.get("layout"), kwargs.get("inputs_embeds")
        self._rows, self._real = 1 if embeds is None else embeds.shape[0], None
        padding = None if layout is None else layout.padding
        if padding is not None:
            inverse = torch.zeros_like(padding.lengths).unsqueeze(1) if padding.inverse is None else padding.inverse
            self._real = inverse < padding.lengths.unsqueeze(1)

    def _see(self, name: str, router: NemotronHTopkRouter, output: tuple[Tensor, Tensor, Tensor]):
        logits, weights, index = output
        if self.training_only and not router.training:
            return None
        # The backbone's padding describes these tokens only if it speaks of as many.
        real = self._real if self._real is not None and self._real.numel() == index.shape[0] else None
        with torch.no_grad():
            seen = torch.ones_like(index) if real is None else real.reshape(-1, 1).to(index.dtype).expand_as(index)
            self.counts[name].scatter_add_(
                0, index.reshape(-1).to(self.counts[name].device), seen.reshape(-1).to(self.counts[name].device)
            )
        if not (self.coefficient and router.training):
            return None
        loss = self.coefficient * sequence_balance_loss(logits, index, self._rows, real)
        self._losses.append(loss.detach())
        return (logits, _AddGradient.apply(weights, loss, self.gradient_scale), index) if loss.requires_grad else None

    def take_balance_loss(self) -> float:
        """Mean, over routers and forwards since the last call, of the balance loss (coefficient included)."""
        losses, self._losses = self._losses, []
        return float(torch.stack([loss.cpu() for loss in losses]).mean()) if losses else 0.0

    @torch.no_grad()
    def sum_over_ranks(self) -> None:
        """Add up all ranks' counts, in one collective whatever the number of routers."""
        if dist.is_available() and dist.is_initialized() and self.counts:
            counts = list(self.counts.values())
            total = torch.cat([count.to(counts[0].device) for count in counts])
            dist.all_reduce(total)
            for count, summed in zip(counts, total.split([len(count) for count in counts]), strict=True):
                count.copy_(summed)

    def reset(self) -> None:
        """Start counting afresh."""
        for count in self.counts.values():
            count.zero_()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def statistics(self) -> dict[str, LoadStatistics]:
        """Per router, how even the load is."""
        return {name: LoadStatistics.of(count) for name, count in self.counts.items()}

    def maximum_violation(self) -> dict[str, float]:
        """Per router; see `LoadStatistics`."""
        return {name: found.maximum_violation for name, found in self.statistics().items()}

    def dead_experts(self) -> dict[str, int]:
        """Per router; see `LoadStatistics`."""
        return {name: found.dead_experts for name, found in self.statistics().items()}


@torch.no_grad()
def update_correction_bias(loads: RouterLoads, rate: float = 1e-3) -> None:
    """Move each router's `e_score_correction_bias` by `rate` towards balance, from counts summed over all ranks."""
    loads.sum_over_ranks()
    for name, count in loads.counts.items():
        load = count.float()
        bias = loads.routers[name].e_score_correction_bias
        bias += rate * torch.sign(load.mean() - load).to(bias.device)


class RouterBiasCallback(TrainerCallback):
    """Applies `update_correction_bias` after every optimizer step of a `Trainer`, and keeps what was counted for its logs.

    Args:
        rate: step of the bias, 1e-3 in the release's pretraining; 0 counts only.
        coefficient: of the sequence-level balance loss, 1e-4 in the release's pretraining; 0 for none.

    Attributes:
        expert_share: per router, the share of tokens of each expert between the last two logs, largest first.
    """

    def __init__(self, rate: float = 1e-3, coefficient: float = 0.0):
        self.rate, self.coefficient = rate, coefficient
        self.expert_share: dict[str, list[float]] = {}
        self.loads: RouterLoads | None = None
        self._since_log: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.loads = RouterLoads(model, self.coefficient, training_only=True)
        # Each micro-batch gives its own mean; the step takes the mean of those.
        self.loads.gradient_scale = 1 / args.gradient_accumulation_steps
        self._since_log = {name: torch.zeros_like(count) for name, count in self.loads.counts.items()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        update_correction_bias(self.loads, self.rate)
        for name, count in self.loads.counts.items():
            self._since_log[name] += count
        self.loads.reset()

    def on_train_end(self, args, state, control, **kwargs):
        self.loads.close()

    def take_logs(self) -> dict[str, float]:
        """Statistics of all loads since the last call: the worst router's, and each one's under its layer's name."""
        if self.loads is None or not any(int(count.sum()) for count in self._since_log.values()):
            return {}
        found = {layer_name(name): LoadStatistics.of(count) for name, count in self._since_log.items()}
        logs: dict[str, float] = {"maximum_violation": max(one.maximum_violation for one in found.values())}
        for layer, one in found.items():
            logs[f"balance/{layer}/maximum_violation"] = one.maximum_violation
            logs[f"balance/{layer}/entropy"] = one.entropy
            logs[f"balance/{layer}/dead_experts"] = one.dead_experts
        self.expert_share = {name: sorted_share(count) for name, count in self._since_log.items()}
        for count in self._since_log.values():
            count.zero_()
        return logs


def sorted_share(count: Tensor) -> list[float]:
    """Each expert's share of the tokens, largest first, from tokens per expert (experts,)."""
    return (count / count.sum().clamp(min=1)).sort(descending=True).values.tolist()


def layer_name(router: str) -> str:
    """`layers.1` or `mtp.layers.1` from a router's module name, however the model is wrapped."""
    found = re.search(r"(mtp\.)?layers\.\d+", router)
    return found[0] if found else router
