"""The Triton kernels of packed weights against float64: in Triton's interpreter on a CPU, compiled where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.reference.fp8 import quantize_fp8
from nemotron_super.kernels_hub.reference.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from nemotron_super.kernels_hub.registry import use_kernels

pytestmark = pytest.mark.no_cover

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["nvfp4", "fp8"]
phases = (Phase.explicit, Phase.generate)
some = settings(max_examples=60 if ON_GPU else 8, deadline=None, derandomize=True, phases=phases)
seeds = st.integers(0, 2**16)


def normal(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def bundled(module):
    """A module of the kernel repository that travels with the package."""
    return sys.modules[f"{registry._bundle().__name__}.{module}"]


def stored(name, weight):
    """Packed tensors of (..., out, in) and what they stand for, in float64."""
    amax = weight.abs().amax((-2, -1))
    if name == "fp8":
        scale = amax / 448
        packed = quantize_fp8(weight, scale[..., None, None])
        return (packed, scale), packed.double() * scale[..., None, None].double()
    scale = amax / 2688
    packed, blocks = quantize_nvfp4(weight, scale[..., None])
    one = torch.ones((), device=weight.device)
    return (packed, blocks, scale), dequantize_nvfp4(packed, blocks, one, torch.float64) * scale[
        ..., None, None
    ].double()


def check_against(found, same, exact):
    """As `check` of conftest: twice the error of torch in the same dtype, plus 1e-5."""
    for place, (a, b, truth) in enumerate(zip(found, same, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        size = truth.norm().item() or 1.0
        error, allowed = ((t.double() - truth).norm().item() / size for t in (a, b))
        assert error <= 2 * max(allowed, 0.21 * torch.finfo(a.dtype).eps) + 1e-5, f"result {place}: {error:.2e}"


def plain_experts(x, index, weights, up, down):
    """Each pair by itself, everything in the dtype of x, as torch does it on a GPU; its reference on a CPU is in float32."""
    up, down = up.to(x.dtype)[index], down.to(x.dtype)[index]
    hidden = (up @ x[:, None, :, None]).relu().square()
    return ((down @ hidden).squeeze(-1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def run(call, leaves, grad):
    leaves = [leaf.detach().requires_grad_(grad) for leaf in leaves]
    with torch.set_grad_enabled(grad):
        out = call(*leaves)
        grads = []
        if grad:
            towards = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
            grads = torch.autograd.grad(out, leaves, towards)
    return [out.detach(), *grads]


@some
@given(
    name=st.sampled_from(NAMES),
    vectors=st.sampled_from([(), (1,), (1, 1), (2,), (2, 3), (20,), (65,), (0,)]),
    rows=st.sampled_from([1, 7, 40, 130]),
    width=st.sampled_from([16, 64, 272, 2080]),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    dtype=st.sampled_from(DTYPES),
    grad=st.booleans(),
    seed=seeds,
)
def test_linear(name, vectors, rows, width, size, dtype, grad, seed):
    x, weight = normal(seed, (*vectors, width), (rows, width))
    packed, exact = stored(name, weight * size)
    op, x = getattr(registry, f"{name}_linear"), (x / size).to(dtype)
    results = []
    for source in ("triton", "torch"):
        with use_kernels(source):
            results.append(run(lambda x: op(x, *packed), [x], grad))
    check_against(*results, run(lambda x: x @ exact.t(), [x.double()], grad))


@some
@given(
    name=st.sampled_from(NAMES),
    vectors=st.sampled_from([(1,), (2,), (2, 3), (20,), (65,)]),
    rows=st.sampled_from([7, 130]),
    width=st.sampled_from([64, 272, 2080]),
    relu2=st.booleans(),
    terms=st.integers(0, 3),
    grad=st.booleans(),
    seed=seeds,
)
def test_linear_and_what_follows_it(name, vectors, rows, width, relu2, terms, grad, seed):
    x, weight, *plus = normal(seed, (*vectors, width), (rows, width), *[(*vectors, rows)] * terms)
    packed, exact = stored(name, weight)
    op, x, plus = getattr(registry, f"{name}_linear"), x.bfloat16(), [t.bfloat16() for t in plus]

    def follow(x):
        out = x @ exact.t()
        return (out.relu().square() if relu2 else out) + sum(t.double() for t in plus)

    results = []
    for source in ("triton", "torch"):
        with use_kernels(source):
            results.append(run(lambda x: op(x, *packed, relu2, tuple(plus)), [x], grad))
    check_against(*results, run(follow, [x.double()], grad))


@some
@given(
    name=st.sampled_from(NAMES),
    tokens=st.sampled_from([1, 3, 16, 17, 40]),
    experts=st.sampled_from([1, 2, 6]),
    data=st.data(),
    width=st.sampled_from([16, 64]),
    intermediate=st.sampled_from([16, 96]),
    routing=st.sampled_from(["any", "one", "avoid"]),
    dtype=st.sampled_from(DTYPES),
    grad=st.booleans(),
    seed=seeds,
)
def test_experts(name, tokens, experts, data, width, intermediate, routing, dtype, grad, seed):
    top_k = data.draw(st.integers(1, experts))
    x, weights, up, down = normal(
        seed, (tokens, width), (tokens, top_k), (experts, intermediate, width), (experts, width, intermediate)
    )
    (up, exact_up), (down, exact_down) = stored(name, up), stored(name, down)
    generator = torch.Generator().manual_seed(seed)
    first = 1 if routing == "avoid" and experts > top_k else 0
    index = torch.stack([torch.randperm(experts - first, generator=generator)[:top_k] + first for _ in range(tokens)])
    index = (index[:1].expand(tokens, -1) if routing == "one" else index).to(DEVICE)
    op, x = getattr(registry, f"{name}_experts"), x.to(dtype)
    with use_kernels("triton"):
        found = run(lambda x, w: op(x, index, w, up, down), [x, weights], grad)
    same, exact = (
        run(lambda x, w: plain_experts(x, index, w, exact_up, exact_down), leaves, grad)
        for leaves in ([x, weights], [x.double(), weights.double()])
    )
    check_against(found, same, exact)


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_every_size(name, size, monkeypatch):
    """As many tokens to an expert as Super has in a long prompt take larger blocks, here forced on a few."""
    monkeypatch.setattr(bundled("quantized_experts"), "_block", lambda *_: size)
    x, weights, up, down = normal(0, (33, 32), (33, 2), (3, 48, 32), (3, 32, 48))
    (up, exact_up), (down, exact_down) = stored(name, up), stored(name, down)
    index = torch.tensor([[0, 2], [2, 1], [1, 0]] * 11, device=DEVICE)
    with use_kernels("triton"):
        op = getattr(registry, f"{name}_experts")
        found = run(lambda x, w: op(x, index, w, up, down), [x, weights], True)
    exact = run(lambda x, w: plain_experts(x, index, w, exact_up, exact_down), [x.double(), weights.double()], True)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_every_byte_is_decoded():
    """All FP8 bytes, and all pairs of NVFP4 codes under block scales from the least to the largest, to the bit."""
    packed_module = bundled("_packed")
    every = torch.arange(256, dtype=torch.uint8).view(8, 32)
    bytes_8 = torch.where(every % 128 == 127, 0, every)  # without NaN
    scales = torch.cat([torch.arange(1, 9), torch.arange(9, 124, 5), torch.tensor([126])]).to(torch.uint8)
    one = torch.ones((), device=DEVICE)
    for codes, block_scale in ((bytes_8, None), (every, scales.view(8, 4))):
        codes, block_scale = codes.to(DEVICE), None if block_scale is None else block_scale.to(DEVICE)
        if block_scale is None:
            exact = codes.view(torch.float8_e4m3fn).float()
        else:
            exact = dequantize_nvfp4(codes, block_scale.view(torch.float8_e4m3fn), one, torch.float32)
        packed, units = (codes, block_scale, one), torch.eye(exact.shape[1], device=DEVICE)
        assert packed_module.unpack(packed, torch.float32).equal(exact)
        assert packed_module.unpack(packed, torch.bfloat16).float().equal(exact)  # six bits at most
        assert packed_module.tiles(units.bfloat16(), packed).float().t().equal(exact.bfloat16().float())
        units = units.bfloat16()
        for some in units.split(8):
            assert packed_module.few(some, packed).equal((some.float() @ exact.t()).bfloat16())
        for unit, column in zip(units.split(1), exact.t(), strict=True):
            assert packed_module.stream(unit, None, packed)[0].equal(column.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64), (1, 3, 16), (5, 7, 48), (3, 33, 272), (2, 0, 16), (0, 8, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_unpacked_in_memory(name, shape, dtype):
    """Matrices and stacks with a scale for each, of fewer words than a program takes and of several programs, to the bit."""
    generator = torch.Generator().manual_seed(0)
    *stack, rows, width = shape
    scale = torch.rand(stack, generator=generator) * 10 ** torch.empty(stack).uniform_(-9, 9, generator=generator)
    codes, block_scale = torch.randint(256, (*stack, rows, width // 2), generator=generator, dtype=torch.uint8), None
    if name == "fp8":
        codes = torch.where(codes % 128 == 127, 0, codes)  # without NaN
        units = codes.view(torch.float8_e4m3fn).float()
    else:
        block_scale = torch.randint(1, 127, (*stack, rows, width // 16), generator=generator, dtype=torch.uint8)
        units = dequantize_nvfp4(codes, block_scale.view(torch.float8_e4m3fn), torch.ones(()), torch.float32)
    packed = codes.to(DEVICE), None if block_scale is None else block_scale.to(DEVICE), scale.to(DEVICE)
    found = bundled("_packed").unpack(packed, dtype)
    assert found.dtype == dtype and found.cpu().equal((units * scale[..., None, None]).to(dtype))


@pytest.mark.parametrize("routing", ["any", "one", "avoid"])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_experts_unpacked_in_parts(name, experts, routing, monkeypatch):
    """What many pairs an expert take, forced on a few, with room for two experts: one part, several, and a smaller last one."""
    quantized, unpacked = bundled("quantized_experts"), []
    tokens, width, inner, top_k = 150, 64, 144, min(2, experts)
    monkeypatch.setattr(quantized, "_MANY", 0)
    monkeypatch.setattr(quantized, "_ROOM", 2 * width * inner * 2 + 1)
    unpack_into = quantized.unpack_into

    def watched(packed, out):
        unpacked.append(out)
        return unpack_into(packed, out)

    monkeypatch.setattr(quantized, "unpack_into", watched)
    x, weights, up, down = normal(
        0, (tokens, width), (tokens, top_k), (experts, inner, width), (experts, width, inner)
    )
    (up, exact_up), (down, exact_down) = stored(name, up), stored(name, down)
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    index = index.clamp(min={"any": 0, "one": experts - 1, "avoid": experts // 2}[routing]).to(DEVICE)
    x = x.bfloat16()
    with torch.no_grad(), use_kernels("triton"):
        found = getattr(registry, f"{name}_experts")(x, index, weights, up, down)
    args = (index, weights, exact_up, exact_down)
    check_against([found], [plain_experts(x, *args)], [plain_experts(x.double(), *args)])
    parts = {1: [1], 2: [2], 5: [2, 2, 1]}[experts]
    assert [t.shape[0] for t in unpacked] == parts * 2
    assert len({t.data_ptr() for t in unpacked}) == 1  # one place for all


@pytest.mark.parametrize("name", NAMES)
def test_long_rows_in_parts(name):
    """Rows that one stretch of words does not hold: their sums are added with the experts'."""
    x, weights, up, down = normal(0, (2, 32), (2, 2), (3, 1056, 32), (3, 32, 1056))
    (up, exact_up), (down, exact_down) = stored(name, up), stored(name, down)
    index = torch.tensor([[0, 2], [2, 1]], device=DEVICE)
    with torch.no_grad(), use_kernels("triton"):  # with gradients blocks of pairs would serve
        found = getattr(registry, f"{name}_experts")(x.bfloat16(), index, weights, up, down)
    args = (index, weights, exact_up, exact_down)
    same, exact = plain_experts(x.bfloat16(), *args), plain_experts(x.bfloat16().double(), *args)
    check_against([found], [same], [exact])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e20, 1e34])
def test_numbers_of_any_size(name, size):
    """Pairs of float16 are made of numbers near the largest of their block: its size does not matter, and neither do small ones beside."""
    x, weight = normal(1, (3, 64), (5, 64))
    packed, exact = stored(name, weight)
    x = (x * torch.logspace(-6, 0, 64, device=DEVICE) * size).bfloat16()
    for rows in (x, x[:1]):
        with use_kernels("triton"):
            found = getattr(registry, f"{name}_linear")(rows, *packed)
        same = (rows.double() @ exact.t()).bfloat16()
        assert (found.double() - same.double()).norm() <= 2**-7 * same.double().norm()
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    with use_kernels("triton"):
        found = [getattr(registry, f"{name}_linear")(rows, *packed) for rows in (x, x[:1], x[1:2])]
    assert not any(t.isfinite().any() for t in (found[0][:2], *found[1:])) and found[0][2].isfinite().all()


def test_they_compile(tmp_path):
    """For Ampere and Hopper, which takes no GPU. Codes are subnormal numbers until they are multiplied: nothing may flush them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    script = Path(__file__).with_name("compile_packed.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout)
    assert len(cases) == 32
    for name, found in cases.items():
        assert not found["flushes"] and found["spilled"] == 0, name
        assert found["tensor cores"] == name.startswith(("few", "tiles", "grouped")), name
        assert found["shared"] <= (163 if " 80" in name else 227) * 1024, name
        if name.startswith("unpack") and name.endswith("bf16"):
            assert not found["shared"], f"{name}: numbers are stored by other threads than read them"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operator_registration(name, grad, tokens=2):
    """Fake tensors, autograd and schema of every operator; none changes its inputs."""
    ops = registry._bundle()._ops.ops
    x, weights, up, down = normal(0, (tokens, 16), (tokens, 2), (3, 32, 16), (3, 16, 32))
    x, weights = x.requires_grad_(grad), weights.requires_grad_(grad)
    (up, _), (down, _) = stored(name, up), stored(name, down)
    index = torch.tensor([[0, 2]] * tokens, device=DEVICE)
    # As bytes: opcheck fills tensors with random numbers, for which float8 has no arithmetic.
    flat = [(t[0].view(torch.uint8), t[1].view(torch.uint8) if len(t) == 3 else None, t[-1]) for t in (up, down)]
    torch.library.opcheck(ops.quantized_experts.default, (x, index, weights, *flat[0], *flat[1]))
    first = [(t if t is None else t[0]) for t in flat[0]]
    torch.library.opcheck(ops.quantized_linear.default, (x, *first))
    if not grad:
        torch.library.opcheck(ops.quantized_experts_inference.default, (x, index, weights, *flat[0], *flat[1]))


@pytest.mark.parametrize(
    "op, change, words",
    [
        ("fp8_linear", lambda a: (torch.ones(2, 10), torch.ones(4, 10).to(torch.float8_e4m3fn), a[2]), "rows of 10"),
        ("fp8_linear", lambda a: (a[0].double(), *a[1:]), "float64"),
        ("fp8_linear", lambda a: (a[0], torch.ones(16, 8).to(torch.float8_e4m3fn).t(), a[2]), "not contiguous"),
        ("nvfp4_linear", lambda a: (a[0], torch.ones(100, dtype=torch.uint8)[4:68].view(8, 8), *a[2:]), "begins at byte 4"),
        ("nvfp4_experts", lambda a: (*a, (torch.ones(8), torch.ones(8))), "simulated"),
    ],
)  # fmt: skip
@pytest.mark.skipif(ON_GPU, reason="on a machine with a GPU the kernels are compiled, and do not take CPU tensors")
def test_what_the_kernels_cannot_serve(op, change, words):
    args = change(registry._example(op, torch.device("cpu"), torch.float32))
    with use_kernels("triton"), pytest.raises(registry.KernelError, match=words):
        getattr(registry, op)(*args)
