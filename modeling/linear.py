"""The linear maps of the model: `nn.Linear`, multiplied by what is fastest for the tensors at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels_hub.reference.linear import finished, linear
from ..kernels_hub.registry import relu_squared, small_batch_linear

_FEW_TOKENS = 64  # as many as the registry's op is made for


def few_tokens(x: Tensor) -> bool:
    """Whether x (..., in) is multiplied as a stream: one or a few decoded tokens, without gradients."""
    # A compiler would take the comparison as a promise about lengths to come.
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() > _FEW_TOKENS * x.shape[-1])


class NemotronHLinear(nn.Linear):
    """`nn.Linear` in every respect but speed. Input (..., in), output (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return (small_batch_linear if few_tokens(x) else linear)(x, self.weight, self.bias)

    def product(self, x: Tensor, relu2: bool, plus: tuple[Tensor, ...]) -> Tensor:
        """See `product_of`; for few tokens."""
        return small_batch_linear(x, self.weight, self.bias, relu2, plus)


def product_of(module: nn.Module, x: Tensor, relu2: bool = False, plus: tuple[Tensor | None, ...] = ()) -> Tensor:
    """`module(x)`, then relu(...)^2, or sums with tensors of its shape: with few tokens by the kernel of the product.

    Args:
        module: a linear map, or what stands in its place, such as one with an adapter.
        plus: added one after another, each sum rounded; what is None is left out.
    """
    terms = tuple(term for term in plus if term is not None)
    # Not where anything else has a hand in the module's output: a subclass, a hook, another `forward`.
    alone = "product" in vars(type(module)) and "forward" not in vars(module)
    if alone and not module._forward_hooks and not module._forward_pre_hooks and few_tokens(x):
        return module.product(x, relu2, terms)
    out = module(x)
    return finished(relu_squared(out) if relu2 else out, False, terms)
