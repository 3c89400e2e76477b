"""LoRA on routed experts whose weights are packed, in the place of PEFT's wrapper of stacked parameters.

PEFT adapts stacked experts by adding to the parameter for the length of a call. What is packed can neither be added to nor be
unpacked as a whole; so this wrapper hands the factors to the experts, which take them on the tokens. It is PEFT's class in all
else: adapters have the same names and shapes as over BF16, so that those trained over one serve over the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from ..modeling.quantized_layers import QuantizedExperts


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one projection of `QuantizedExperts`. Of its name, by which PEFT knows the wrappers that may nest."""

    def _packed(self) -> QuantizedExperts | None:
        """The experts, for as long as they are not dequantised."""
        base = self.get_base_layer()
        return base if isinstance(base, QuantizedExperts) else None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        packed = self._packed()
        assert packed is not None
        experts, rows, columns = packed.shapes[self.parameter_name]
        self.num_experts, self._param_ndim = experts, 3
        return rows, columns  # which `update_layer` swaps, as for every stack of (out, in)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would give the adapter the dtype of the codes.
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and factors[adapter_name].weight.device.type != "meta":
                factors[adapter_name].to(self.get_param().device, dtype=torch.float32)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (experts, rank, in) and B (experts, out, rank) times the adapter's scale."""
        a: Tensor = self.lora_A[adapter_name].weight
        b: Tensor = self.lora_B[adapter_name].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return a, b * self.scaling[adapter_name]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts = self._packed()
        if experts is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        factors = [self._factors(name) for name in active_adapters if name in self.lora_A]
        if factors:
            experts.low_rank[self.parameter_name] = factors
        try:
            yield
        finally:
            experts.low_rank.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self._packed() is not None:
            raise RuntimeError(
                f"{self.parameter_name} of the routed experts is packed in {self._packed().weight_format.name}: adapters do not "
                "merge into it. `export_merged` of training/lora.py dequantises first, and can quantise again."
            )
        super().merge(safe_merge, adapter_names)


def adapt_packed_experts(config: LoraConfig) -> LoraConfig:
    """Make PEFT use this file's wrapper for packed experts, through its own register; returns `config`."""
    config._register_custom_module({QuantizedExperts: ParamWrapper})
    return config
