"""New keys and values into slots: the kernel writes the bytes of the reference, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.reference.fill_slots import fill_slots
from nemotron_super.kernels_hub.registry import KernelError, use_kernels

pytestmark = pytest.mark.no_cover

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FP8 = torch.float8_e4m3fn


def make_inputs(batch, heads, slots, tokens, width, dtype, narrow, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    stored = [normal(batch, heads, slots, width).to(FP8 if narrow else dtype) for _ in range(2)]
    # As slices of one projection.
    _, *new = (size * normal(batch, tokens, 3, heads, width)).to(dtype).transpose(1, 3).unbind(2)
    index = torch.stack([torch.randperm(slots, generator=generator)[:tokens] for _ in range(batch)])
    scales = [torch.tensor(s) for s in (0.037, 1.7)] if narrow else []
    return [t.to(DEVICE) for t in (*stored, *new, index, *scales)]


def bits(t):
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same(args):
    found, expected = ([*(t.clone() for t in args[:2]), *args[2:]] for _ in range(2))
    with use_kernels("triton"), torch.no_grad():
        registry.fill_slots(*found)
    fill_slots(*expected)
    for a, b, before in zip(found[:2], expected[:2], args[:2], strict=True):
        assert torch.equal(bits(a), bits(b)) and not torch.equal(bits(a), bits(before))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    slots=st.integers(4, 20),
    tokens=st.integers(1, 4),
    width=st.sampled_from([8, 24, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    narrow=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_the_bytes_of_the_reference(batch, heads, slots, tokens, width, dtype, narrow, size, seed):
    assert_same(make_inputs(batch, heads, slots, tokens, width, dtype, narrow, seed, size))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_is_rounded_as_torch_does_it(dtype, scale):
    """All bfloat16 that there are, ends of the range and halves between two FP8 included."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()].to(dtype)[-255 * 256 :].view(1, 2, 255, 128).to(DEVICE)
    stored = torch.zeros(1, 2, 255, 128, device=DEVICE).to(FP8)
    index = torch.arange(numbers.shape[2], device=DEVICE).unsqueeze(0)
    factor = torch.tensor(scale, device=DEVICE)
    assert_same([stored, stored.clone(), numbers, -numbers, index, factor, 2 * factor])


def test_what_is_not_a_number_stays_so():
    keys, values, new, *rest = make_inputs(1, 1, 4, 1, 8, torch.bfloat16, True)
    with use_kernels("triton"), torch.no_grad():
        registry.fill_slots(keys, values, torch.full_like(new, float("nan")), *rest)
    assert keys[0, 0, rest[1].item()].float().isnan().all()


def test_without_tokens():
    args = make_inputs(2, 2, 5, 1, 8, torch.bfloat16, False)
    before = [t.clone() for t in args[:2]]
    with use_kernels("triton"), torch.no_grad():
        registry.fill_slots(*args[:2], *(t[:, :, :0] for t in args[2:4]), args[4][:, :0])
    assert all(map(torch.equal, before, args))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda k, v, nk, nv, i: (k, v, nk.requires_grad_(), nv, i), "no gradient"),
        (lambda k, v, nk, nv, i: (k, v, nk.double(), nv.double(), i), "would write torch.float64"),
        (lambda k, v, nk, nv, i: (k, v, nk, nv.float(), i), "one dtype"),
        (lambda k, v, nk, nv, i: (k.to(FP8), v.to(FP8), nk, nv, i), "would write torch.bfloat16"),
        (lambda k, v, nk, nv, i: (k, v, nk, nv, i, torch.ones((), device=DEVICE)), "scales for both"),
        (lambda k, v, nk, nv, i: (k.mT.contiguous().mT, v, nk, nv, i), "`keys` has strides"),
    ],
)  # fmt: skip
def test_refused(change, words):
    args = change(*make_inputs(2, 2, 9, 3, 8, torch.bfloat16, False))
    with use_kernels("triton"), pytest.raises(KernelError, match=words):
        registry.fill_slots(*args)


def test_operator_registration():
    args = [*make_inputs(2, 2, 9, 3, 8, torch.float32, False), None, None]
    torch.library.opcheck(registry._bundle()._ops.ops.fill_slots.default, args)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU: the kernels are compiled here")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("batch, tokens, slots", [(1, 1, 8192), (8, 4, 8192), (1, 1, 1 << 20)])
def test_the_shapes_of_super(batch, tokens, slots, narrow):
    assert_same(make_inputs(batch, 2, slots, tokens, 128, torch.bfloat16, narrow))
