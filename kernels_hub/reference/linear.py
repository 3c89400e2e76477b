"""A linear map, in whichever of torch's products is fastest for its size on a CPU in float32.

    y = x W^T + b

torch multiplies float32 on a CPU with MKL, which on processors of other makers falls far behind where there are few rows:
oneDNN, the other library inside torch, reads a weight two to three times as fast for one token and up to four times for
2 to 8. A small weight times one row is fastest as a plain product and sum.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers in a weight up to which one row is multiplied and summed by plain operations: their temporary stays in cache.
_SMALL = 1 << 17
_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_PLAIN = (Tensor, nn.Parameter)


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can be asked directly: float32 on a CPU, nothing that has to see the operation by its own name.

    What sees operations: compilers, dispatch modes such as counters of FLOPs, and the transforms of `torch.func`.
    """
    return (
        _HAS_ONEDNN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and x.shape[-1:] == weight.shape[1:]  # else torch's own product says what does not fit
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _bias_fits(bias: Tensor, weight: Tensor) -> bool:
    """oneDNN reads a bias as so many numbers in a row, whatever its strides say."""
    return bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()


def rows_times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient, for arguments that `onednn_serves`; x (..., in), weight (out, in) of any strides, bias dense."""
    if x.numel() == x.shape[-1] and weight.numel() <= _SMALL:
        out = torch.linalg.vecdot(weight, x.view(-1))
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The same with a gradient; what sums over rows stays with MKL, which is faster there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rows_times(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            rows_times(grad, weight.t()) if for_x else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            flat.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out) in the dtype of x.
    """
    if not onednn_serves(x, weight) or x.numel() == 0 or not (bias is None or _bias_fits(bias, weight)):
        return F.linear(x, weight, bias)
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return rows_times(x, weight, bias)


def finished(out: Tensor, relu2: bool, plus: tuple[Tensor, ...]) -> Tensor:
    """What a layer does to a product: relu(out)^2, or sums with terms of its shape, one after another."""
    out = F.relu(out).square() if relu2 else out
    for term in plus:
        out = term + out
    return out


def small_batch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu2: bool = False, plus: tuple[Tensor, ...] = ()
) -> Tensor:
    """`linear`, and what follows it.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        relu2: return relu(...)^2.
        plus: tensors like the result, added to it one after another, each sum rounded.

    Returns:
        (..., out) in the dtype of x.
    """
    return finished(linear(x, weight, bias), relu2, plus)


def joint_linear(x: Tensor, weights: Sequence[Tensor], multiply: Callable[..., Tensor] = linear) -> Tensor:
    """The products of x (..., in) with several weights (out, in), side by side: (..., sum of out)."""
    return torch.cat([multiply(x, weight) for weight in weights], -1)
