"""The linear maps of the model: `nn.Linear`, multiplied by what is fastest for the tensors at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels_hub.reference.linear import finished, linear
from ..kernels_hub.registry import joint_linear, relu_squared, small_batch_linear

# The registry's op is made for 64, but steps of 24 to 64 rows of Super's slice take 1 to 2 % less by torch's product (H200, 2026-12-01).
_FEW_TOKENS = 16


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

    def bare_weight(self) -> Tensor | None:
        """The weight, if `forward` does nothing but multiply by it."""
        return self.weight if self.bias is None else None


def alone(module: nn.Module, name: str) -> bool:
    """Whether the class of `module` itself defines `name`, and nothing else has a hand in what the module gives.

    That is a subclass, a hook, another `forward`.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    return name in vars(type(module)) and "forward" not in vars(module) and not hooked


def bare_weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a linear map that does nothing but multiply by it, for whoever multiplies by several at once."""
    weight = module.bare_weight() if alone(module, "bare_weight") else None
    return weight if type(weight) in (Tensor, nn.Parameter) else None


def product_of(
    module: nn.Module,
    x: Tensor,
    relu2: bool = False,
    plus: tuple[Tensor | None, ...] = (),
    overwrite: bool = False,
) -> Tensor:
    """`module(x)`, then relu(...)^2, or sums with tensors of its shape: with few tokens by the kernel of the product.

    Args:
        module: a linear map, or what stands in its place, such as one with an adapter.
        plus: added one after another, each sum rounded; what is None is left out.
        overwrite: nobody else reads the first of `plus`, which is there: the product may be added to it in its place.
    """
    terms = tuple(term for term in plus if term is not None)
    if alone(module, "product") and few_tokens(x):
        return module.product(x, relu2, terms)
    if overwrite and not relu2:
        weight = bare_weight_of(module)
        if weight is not None and _adds_up(x, weight, terms[0]):
            return finished(terms[0].addmm_(x, weight.t()), False, terms[1:])
    out = module(x)
    return finished(relu_squared(out) if relu2 else out, False, terms)


def _adds_up(x: Tensor, weight: Tensor, term: Tensor) -> bool:
    """Whether a product adds itself to `term` as it is written, which saves a GPU a pass over both, and a rounding."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cuda:
        return False
    plain = x.dim() == 2 and term.is_contiguous() and not torch.is_autocast_enabled(x.device.type)
    return plain and x.dtype == weight.dtype == term.dtype


def products_of(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """`module(x)` of each; of few tokens slices of one product, where all do nothing but multiply by weights of one dtype."""
    if few_tokens(x):
        weights = [weight for weight in map(bare_weight_of, modules) if weight is not None]
        if len(weights) == len(modules) and len({weight.dtype for weight in weights}) == 1:
            return list(joint_linear(x, weights).split([weight.shape[0] for weight in weights], -1))
    return [module(x) for module in modules]
