"""Depthwise causal convolution followed by SiLU, over a sequence and for one token, in plain torch.

    out_t = silu(bias + sum_k weight_k x_{t - (K - 1) + k})

The sequence form works on (batch, seq, channels), the layout the input projection writes, so nothing is transposed. It
reads a document's own inputs only (`seq_idx`), and it can start from the last inputs of an earlier call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _same_document(seq_idx: Tensor | None, shift: int) -> Tensor | None:
    """(batch, seq - shift, 1), true where a position and the one `shift` before it belong together."""
    return None if seq_idx is None else (seq_idx[:, shift:] == seq_idx[:, :-shift]).unsqueeze(-1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The convolution before SiLU, in float32 (or float64)."""
    kernel, length = weight.shape[1], x.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    if seq_idx is None and x.device.type == "cpu":
        # (batch, seq, channels) is the channels-last form of a picture one row high, which oneDNN convolves as it lies.
        before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if state is None else state[..., 1:].to(work).mT
        picture = torch.cat([before, x], dim=1).unsqueeze(1).permute(0, 3, 1, 2)
        out = F.conv2d(
            picture, weight.to(work)[:, None, None], None if bias is None else bias.to(work), groups=x.shape[2]
        )
        return out.permute(0, 2, 3, 1).squeeze(1)
    taps = weight.to(work).t()
    out = x * taps[-1] if bias is None else torch.addcmul(bias.to(work), x, taps[-1])
    for shift in range(1, min(kernel, length)):
        same = _same_document(seq_idx, shift)
        earlier = x[:, :-shift] if same is None else x[:, :-shift] * same
        out[:, shift:].addcmul_(earlier, taps[-1 - shift])
    if state is not None:
        # Inputs before position 0: column -i of the state is x_{-i}. They belong to the first document of this call.
        for position in range(min(kernel - 1, length)):
            past = state[..., position + 1 :].to(work)  # (batch, channels, kernel - 1 - position)
            add = (past * weight.to(work)[:, : past.shape[-1]]).sum(-1)
            if seq_idx is not None:
                add = add * (seq_idx[:, position] == seq_idx[:, 0]).unsqueeze(-1)
            out[:, position] += add
    return out


@torch.library.custom_op("nemotron_super::causal_conv1d", mutates_args=())
def _conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    out = _convolve(x, weight, bias, state, seq_idx)
    return F.silu(out, inplace=True).to(x.dtype)


@_conv_op.register_fake
def _(x, weight, bias, state, seq_idx):
    return x.new_empty(x.shape)


@torch.library.custom_op("nemotron_super::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel, length = weight.shape[1], x.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    grad = torch.ops.aten.silu_backward(grad.to(work), _convolve(x, weight, bias, state, seq_idx))
    taps = weight.to(work).t()
    x_work = x.to(work)
    grad_x = grad * taps[-1]
    grad_taps = [(grad * x_work).sum((0, 1))]
    for shift in range(1, kernel):
        if shift >= length:
            grad_taps.insert(0, torch.zeros_like(taps[0]))
            continue
        same = _same_document(seq_idx, shift)
        late = grad[:, shift:] if same is None else grad[:, shift:] * same
        grad_x[:, :-shift].addcmul_(late, taps[-1 - shift])
        grad_taps.insert(0, (late * x_work[:, :-shift]).sum((0, 1)))
    grad_weight = torch.stack(grad_taps, dim=-1)
    grad_state = torch.zeros_like(weight, dtype=work).expand(x.shape[0], -1, -1).clone()
    if state is not None:
        for position in range(min(kernel - 1, length)):
            g = grad[:, position].unsqueeze(-1)
            if seq_idx is not None:
                g = g * (seq_idx[:, position] == seq_idx[:, 0])[:, None, None]
            past = state[..., position + 1 :].to(work)
            grad_weight[:, : past.shape[-1]] += (g * past).sum(0)
            grad_state[..., position + 1 :] += g * weight.to(work)[:, : past.shape[-1]]
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad.sum((0, 1)).to(weight.dtype), grad_state


@_conv_backward_op.register_fake
def _(grad, x, weight, bias, state, seq_idx):
    work = torch.promote_types(x.dtype, torch.float32)
    state_grad = x.new_empty((x.shape[0], *weight.shape), dtype=work)
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0]), state_grad


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
    """
    return _conv_op(x, weight, bias, state, seq_idx)


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
