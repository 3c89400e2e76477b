"""Depthwise causal convolution followed by SiLU, over a sequence and for one token, in plain torch.

    out_t = silu(bias + sum_k weight_k x_{t - (K - 1) + k})

The sequence form works on (batch, seq, channels), the layout the input projection writes, so nothing is transposed. It
reads a document's own inputs only (`seq_idx`), and it can start from the last inputs of an earlier call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import as_operator, misshapen, refuse

# Positions per pass of the backward; its temporaries then stay in cache whatever the length.
_BLOCK = 256
# Positions from which oneDNN's convolution takes less time than a few products.
_LONG = 32


def _with_past(x: Tensor, kernel: int, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs with the `kernel - 1` before them, (batch, kernel - 1 + seq, channels), and the same for document ids.

    What a state holds belongs to the first document of this call.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(x.shape[0], kernel - 1, x.shape[2], dtype=work) if state is None else state[..., 1:].to(work).mT
    ids = (
        None
        if seq_idx is None or not x.shape[1]
        else torch.cat([seq_idx[:, :1].expand(-1, kernel - 1), seq_idx], dim=1)
    )
    return torch.cat([past, x.to(work)], dim=1), ids


def _same_document(ids: Tensor, tap: int, kernel: int) -> Tensor:
    """(batch, seq, 1): whether a position and the input its tap reads belong to one document."""
    length = ids.shape[1] - kernel + 1
    return (ids[:, tap : tap + length] == ids[:, kernel - 1 :]).unsqueeze(-1)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """The convolution before SiLU: (batch, kernel - 1 + seq, channels) -> (batch, seq, channels)."""
    kernel, length = weight.shape[1], padded.shape[1] - weight.shape[1] + 1
    weight = weight.to(padded.dtype)
    bias = None if bias is None else bias.to(padded.dtype)
    if ids is None and padded.device.type == "cpu" and length >= _LONG:
        # This layout is the channels-last form of a picture one row high, which oneDNN convolves as it lies.
        picture = padded.unsqueeze(1).permute(0, 3, 1, 2)
        out = F.conv2d(picture, weight[:, None, None], bias, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1).squeeze(1)
    out = padded.new_zeros(padded.shape[0], length, padded.shape[2])
    if bias is not None:
        out += bias
    for tap in range(kernel):
        inputs = padded[:, tap : tap + length]
        # Not by a product with the mask: what is not a number in one document would reach the next.
        inputs = inputs if ids is None else inputs.masked_fill(~_same_document(ids, tap, kernel), 0)
        out.addcmul_(inputs, weight[:, tap])
    return out


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    padded, ids = _with_past(x, weight.shape[1], state, seq_idx)
    return F.silu(_convolve(padded, weight, bias, ids), inplace=True).to(x.dtype).contiguous()


@torch.library.custom_op("nemotron_super::causal_conv1d", mutates_args=())
def _conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    return _conv(x, weight, bias, state, seq_idx)


@_conv_op.register_fake
def _(x, weight, bias, state, seq_idx):
    return x.new_empty(x.shape)


@torch.library.custom_op("nemotron_super::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel, length = weight.shape[1], x.shape[1]
    padded, ids = _with_past(x, kernel, state, seq_idx)
    taps = weight.to(padded.dtype).t().contiguous()
    grad_padded, grad_taps = torch.zeros_like(padded), torch.zeros_like(taps)
    grad_bias = padded.new_zeros(weight.shape[0])
    block = _BLOCK if x.device.type == "cpu" else length
    for start in range(0, length, block):
        end = min(start + block, length)
        window = padded[:, start : end + kernel - 1]
        window_ids = None if ids is None else ids[:, start : end + kernel - 1]
        before_silu = _convolve(window, weight, bias, window_ids)
        g = torch.ops.aten.silu_backward(grad[:, start:end].to(padded.dtype), before_silu)
        grad_bias += g.sum((0, 1))
        for tap in range(kernel):
            seen = g if window_ids is None else g.masked_fill(~_same_document(window_ids, tap, kernel), 0)
            grad_padded[:, start + tap : end + tap].addcmul_(seen, taps[tap])
            grad_taps[tap] += (seen * window[:, tap : tap + end - start]).sum((0, 1))
    # The oldest column of the state is never read.
    grad_state = torch.nn.functional.pad(grad_padded[:, : kernel - 1].mT, (1, 0))
    return (
        grad_padded[:, kernel - 1 :].to(x.dtype).contiguous(),
        grad_taps.t().to(weight.dtype).contiguous(),
        grad_bias.to(weight.dtype),
        grad_state.contiguous(),
    )


@_conv_backward_op.register_fake
def _(grad, x, weight, bias, state, seq_idx):
    work = torch.promote_types(x.dtype, torch.float32)
    state_grad = x.new_empty((x.shape[0], *weight.shape), dtype=work)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), state_grad


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, state, seq_idx = inputs
    ctx.save_for_backward(x, weight, bias, state, seq_idx)


def _autograd(ctx, grad):
    x, weight, bias, state, seq_idx = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_state = torch.ops.nemotron_super.causal_conv1d_backward(
        grad, x, weight, bias, state, seq_idx
    )
    return (
        grad_x,
        grad_weight,
        None if bias is None else grad_bias,
        None if state is None else grad_state.to(state.dtype),
        None,
    )


_conv_op.register_autograd(_autograd, setup_context=_setup_context)


def conv_misfit(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> str | None:
    """Which argument of `causal_conv1d` has not the shape that the others ask for, or None."""
    return misshapen(
        ("weight", weight, (x.shape[2], *weight.shape[1:])),
        ("bias", bias, x.shape[2:]),
        ("state", state, (x.shape[0], *weight.shape)),
        ("seq_idx", seq_idx, x.shape[:2]),
    )


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """Causal depthwise convolution and SiLU over a sequence.

    Args:
        x: (batch, seq, channels).
        weight: (channels, kernel); tap `kernel - 1` meets the current position.
        bias: (channels,) or None.
        state: (batch, channels, kernel), the last `kernel` inputs of an earlier call, oldest first, or None for zeros.
        seq_idx: (batch, seq) document ids; taps never reach into another document. Or None.

    Returns:
        (batch, seq, channels) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    refuse(conv_misfit(x, weight, bias, state, seq_idx))
    return (_conv_op if as_operator() else _conv)(x, weight, bias, state, seq_idx)


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Advance `state` in place by one token and return the convolution's output for it.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; updated in place.
        x: (batch, channels).
        weight, bias: as in `causal_conv1d`.

    Returns:
        (batch, channels) in the dtype of x.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state[..., 1:], x.unsqueeze(-1).to(state.dtype)], dim=-1)
    state.copy_(window)
    out = torch.linalg.vecdot(window.to(work), weight.to(work))
    if bias is not None:
        out += bias.to(work)
    return F.silu(out).to(x.dtype)
