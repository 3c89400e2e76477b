"""How a kernel is judged: its error against float64 may be twice that of torch in the same dtype, plus 1e-5."""

import numpy as np
import pytest
import torch
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_interpreter():
    """Gaps of Triton 3.6's interpreter: scalars under numpy 2.4, and bfloat16, which it truncates and multiplies as bits."""
    from triton.runtime import interpreter

    tl, handle = interpreter.tl, interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    patch_tensor, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_with_scalars(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(value):
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, source, dtype):
        kinds = (source.dtype.scalar, dtype.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return widened(source)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        values = torch.from_numpy(np.ascontiguousarray(source.data))
        bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return handle(bits.reshape(source.data.shape), tl.bfloat16)

    interpreter._patch_lang_tensor = patch_with_scalars
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounded


if DEVICE == "cpu":
    _mend_interpreter()


def _exact(value):
    return value.detach().double() if torch.is_tensor(value) and value.is_floating_point() else value


def _leaves(args):
    return [a for a in args if torch.is_tensor(a) and a.is_floating_point()]


def _run(op, source, args, grad, seed, in_place=0):
    """Outputs, then gradients of all floating inputs, then the inputs written in place."""
    args = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
    args = [a.requires_grad_(grad) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with torch.set_grad_enabled(grad), use_kernels(source):
        outputs = op(*args)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.is_floating_point()]
        grads = []
        if grad:
            generator = torch.Generator().manual_seed(seed)
            upstream = [torch.randn(o.shape, generator=generator).to(o.device).bfloat16().to(o.dtype) for o in outputs]
            grads = torch.autograd.grad(outputs, _leaves(args), upstream)
    return [t.detach() for t in (*outputs, *grads, *args[:in_place])]


@pytest.fixture(scope="session")
def check():
    """`check(name, args, grad=True, in_place=0)`: the Triton kernel of an op against its reference.

    `in_place`: how many leading arguments the op changes; they are compared after the call. `floors`: for single
    results, what the error may be whatever torch's own is, instead of 1e-5.
    """

    def compare(name, args, grad=True, in_place=0, seed=0, floors=None):
        op = getattr(registry, name)
        args = [a.to(DEVICE) if torch.is_tensor(a) else a for a in args]
        found = _run(op, "triton", args, grad, seed, in_place)
        same = _run(op, "torch", args, grad, seed, in_place)
        exact = _run(op, "torch", [_exact(a) for a in args], grad, seed, in_place)
        for place, (a, b, truth) in enumerate(zip(found, same, exact, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype, f"{name}, result {place}: {a.dtype} {tuple(a.shape)}"
            size = truth.norm().item() or 1.0
            error, allowed = ((t.double() - truth).norm().item() / size for t in (a, b))
            # Where there are few numbers, torch's may be rounded by luck: its error counts as the usual one at least.
            allowed = max(allowed, 0.21 * torch.finfo(a.dtype).eps)
            assert error <= 2 * allowed + (floors or {}).get(place, 1e-5), (
                f"{name}, result {place}: error {error:.2e}, torch's own {allowed:.2e}"
            )

    return compare
