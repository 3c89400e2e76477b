"""How a kernel is judged: its error against float64 may be twice that of torch in the same dtype, plus 1e-5.

Without a GPU kernels run in Triton's interpreter, which is mended here, and which refuses here what a GPU would do silently:
reading or writing outside a kernel's arguments.
"""

import inspect
import sys

import numpy as np
import pytest
import torch
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_interpreter():
    """Gaps of Triton 3.6's interpreter: scalars under numpy 2.4, and narrow floats, which it truncates; it multiplies bfloat16 as bits."""
    from triton.runtime import interpreter

    tl, handle = interpreter.tl, interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    patch_tensor, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl
    narrow = builder.create_fp_to_fp

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

    def narrowed(self, source, dtype, *rest):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.float8e4nv):
            return narrow(self, source, dtype, *rest)
        values = torch.from_numpy(np.ascontiguousarray(source.data))
        stored = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return handle(stored.reshape(source.data.shape), tl.float8e4nv)

    interpreter._patch_lang_tensor = patch_with_scalars
    builder.create_fp_to_fp = narrowed
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounded


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that is not its argument's."""


class _Argument:
    """The elements of one tensor a kernel was launched with, by their distance in bytes from its first."""

    def __init__(self, kernel, name, tensor):
        self.kernel, self.name, self.shape, self.strides = kernel, name, tuple(tensor.shape), tensor.stride()
        self.base, self.item = tensor.data_ptr(), tensor.element_size()
        span = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1 if tensor.numel() else 0
        self.end = span * self.item
        self.owned = None  # which elements between the first and the last are its own; of a dense tensor, all
        if self.end < 1 << 24 and span != tensor.numel():
            owned = torch.zeros(span, dtype=torch.bool)
            owned.as_strided(self.shape, self.strides).fill_(True)
            self.owned = owned.numpy()

    def check(self, verb, pointers, mask, value, width, program):
        where = f"`{self.kernel}` {verb} its argument `{self.name}` {self.shape} with strides {self.strides}"
        if mask.shape != pointers.shape or value.shape != pointers.shape or value.itemsize != width:
            raise OutOfBoundsError(
                f"{where}: {pointers.shape} places of {width} bytes, mask {mask.shape}, "
                f"values {value.shape} of {value.itemsize} bytes; program {program}."
            )
        addresses = pointers[mask.astype(bool)]
        distance = addresses.astype(np.int64) - self.base
        outside = (distance < 0) | (distance + width > self.end)
        if outside.any():
            low, high = distance.min() // self.item, distance.max() // self.item
            raise OutOfBoundsError(
                f"{where} outside of it: {outside.sum()} of {distance.size} lanes, elements {low} to {high} of "
                f"{self.end // self.item}; program {program}."
            )
        if (addresses % width).any():
            raise OutOfBoundsError(f"{where} at addresses that are no multiples of {width} bytes; program {program}.")
        if self.owned is not None and not self.owned[distance // self.item].all():
            raise OutOfBoundsError(f"{where} in the gaps between its elements; program {program}.")


def _guard_interpreter():
    """The interpreter follows raw addresses: past a tensor's end it reads what is there, or the process ends.

    So every pointer remembers the argument it was made from, and every load, store and atomic is compared with the
    elements of that argument: its own, not those of the storage that it is a view of.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    copy_arguments, convert = executor._init_args_hst, interpreter._implicit_cvt
    launched: list[tuple[torch.Tensor, _Argument]] = []  # tensors of the running launch with their `_Argument`

    def tensors(value):
        if isinstance(value, tuple):
            return [t for part in value for t in tensors(part)]
        value = getattr(value, "base", value)  # of a descriptor or a reinterpreted tensor
        return [value] if hasattr(value, "data_ptr") else []

    def copy_and_note(self, args, kwargs):
        args, kwargs = copy_arguments(self, args, kwargs)
        named = inspect.getcallargs(self.fn, *args, **kwargs).items()
        launched[:] = [(t, _Argument(self.fn.__name__, name, t)) for name, value in named for t in tensors(value)]
        return args, kwargs

    def convert_and_mark(value):
        converted = convert(value)
        if hasattr(value, "data_ptr"):
            (tensor,) = tensors(value)
            converted.handle.set_attr("argument", next(argument for t, argument in launched if t is tensor))
        return converted

    def marked(result, sources):
        for source in sources:
            if "argument" in getattr(source, "attr", ()):
                result.set_attr("argument", source.attr["argument"])
        return result

    def passed_on(method):
        return lambda self, *args, **kwargs: marked(method(self, *args, **kwargs), args)

    def blocks_of(method):
        def call(self, *args):
            pointers, mask = method(self, *args)
            return marked(pointers, [self.base]), mask

        return call

    def checked(verb, method, pointer_at, mask_at, value_at):
        def call(self, *args, **kwargs):
            pointers = args[pointer_at]
            if "argument" not in pointers.attr:
                raise OutOfBoundsError(
                    f"a kernel {verb} through a pointer made from no argument; program {self.grid_idx}."
                )
            width = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            filled = np.broadcast_to(np.zeros(1, f"V{width}"), pointers.data.shape)
            mask = np.ones_like(pointers.data, bool) if mask_at is None else np.asarray(args[mask_at].data)
            value = filled if value_at is None or args[value_at] is None else args[value_at].data
            pointers.attr["argument"].check(verb, pointers.data, mask, value, width, self.grid_idx)
            return method(self, *args, **kwargs)

        return call

    executor._init_args_hst, interpreter._implicit_cvt = copy_and_note, convert_and_mark
    # On a CPU the arguments are the tensors themselves: copying them back would copy each storage onto itself.
    executor._restore_args_dev = lambda self, *args: None
    for name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "select"):
        setattr(builder, f"create_{name}", passed_on(getattr(builder, f"create_{name}")))
    for blocks in (interpreter.BlockPointerHandle, interpreter.TensorDescHandle):
        blocks.materialize_pointers = blocks_of(blocks.materialize_pointers)
    for name, verb, *places in (
        ("masked_load", "reads", 0, 1, 2),
        ("masked_store", "writes", 0, 2, 1),
        ("atomic_rmw", "updates", 1, 3, 2),
        ("atomic_cas", "updates", 0, None, 2),
    ):
        setattr(builder, f"create_{name}", checked(verb, getattr(builder, f"create_{name}"), *places))


if DEVICE == "cpu":
    _mend_interpreter()
    _guard_interpreter()


def _exact(value):
    if isinstance(value, tuple):
        return tuple(_exact(each) for each in value)
    return value.detach().double() if torch.is_tensor(value) and value.is_floating_point() else value


def _on_device(value):
    if isinstance(value, tuple):
        return tuple(_on_device(each) for each in value)
    return value.to(DEVICE) if torch.is_tensor(value) else value


def _run(op, source, args, grad, seed, in_place=0, constant=()):
    """Outputs, then gradients of all floating inputs that are not `constant`, then the inputs written in place."""
    args = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
    leaves = [a for i, a in enumerate(args) if torch.is_tensor(a) and a.is_floating_point() and i not in constant]
    for leaf in leaves:
        leaf.requires_grad_(grad)
    with torch.set_grad_enabled(grad), use_kernels(source):
        outputs = op(*args)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.is_floating_point()]
        grads: list[torch.Tensor] = []
        if grad:
            generator = torch.Generator().manual_seed(seed)
            wanted = [o for o in outputs if o.requires_grad]
            upstream = [torch.randn(o.shape, generator=generator).to(o.device).bfloat16().to(o.dtype) for o in wanted]
            grads = torch.autograd.grad(wanted, leaves, upstream)
    return [t.detach() for t in (*outputs, *grads, *args[:in_place]) if torch.is_tensor(t)]


@pytest.fixture(scope="session")
def check():
    """`check(name, args, grad=True, in_place=0)`: the Triton kernel of an op against its reference.

    `in_place`: how many leading arguments the op changes; they are compared after the call. `floors`: for single
    results, what the error may be whatever torch's own is, instead of 1e-5. `constant`: places of floating inputs that
    have no gradient.
    """

    def compare(name, args, grad=True, in_place=0, seed=0, floors=None, constant=()):
        op = getattr(registry, name)
        args = [_on_device(a) for a in args]
        found = _run(op, "triton", args, grad, seed, in_place, constant)
        same = _run(op, "torch", args, grad, seed, in_place, constant)
        exact = _run(op, "torch", [_exact(a) for a in args], grad, seed, in_place, constant)
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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The `kernels` library picks a build by torch's backend: let it see CUDA."""
    backends = pytest.importorskip("kernels.backends")
    cuda = backends.CUDA(version=backends.Version("13.0"))
    for module in ("backends", "validate", "variants", "python_deps"):
        loaded = sys.modules.get(f"kernels.{module}")
        if loaded is not None and hasattr(loaded, "_backend"):
            monkeypatch.setattr(loaded, "_backend", lambda: cuda)
