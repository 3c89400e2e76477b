"""Attention to the slots of a fixed-size cache: the reference against its formula, the kernel against the reference."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.reference.decode_attention import decode_attention
from nemotron_super.kernels_hub.registry import KernelError, use_kernels

pytestmark = pytest.mark.no_cover

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FP8 = torch.float8_e4m3fn
# Shrinking a failure takes the interpreter minutes.
some = settings(
    max_examples=80 if ON_GPU else 40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)


def make_inputs(batch, kv_heads, groups, seq, width, slots, room, holes, narrow, dtype, seed):
    """Arguments of the op: a view of a cache with `room` more slots, which are stale, and rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    query = normal(batch, seq, kv_heads * groups, width).transpose(1, 2).to(dtype)
    key, value = (normal(batch, kv_heads, slots + room, width) for _ in range(2))
    first = torch.randint(-2, slots, (batch, 1), generator=generator)  # some rows see nothing
    last = first + torch.arange(seq)
    there = torch.rand(batch, slots + room, generator=generator) < 0.7
    for row, end in enumerate(last[:, -1].tolist()):
        # Nobody sees these, so they may hold anything that is finite.
        key[row, :, end + 1 :] = 100.0
        value[row, :, end + 1 :] = -100.0
    scales = (torch.tensor(0.7), torch.tensor(1.3)) if narrow else (None, None)
    key, value = (t.to(FP8 if narrow else dtype)[:, :, :slots] for t in (key, value))
    return [query, key, value, last, there[:, :slots] if holes else None, width**-0.5, *scales]


def formula(query, key, value, last, there, scaling, k_scale=None, v_scale=None):
    """One query at a time: softmax over exactly the slots that it sees."""
    batch, heads, seq, width = query.shape
    out = torch.zeros(batch, seq, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            for t in range(seq):
                seen = torch.arange(key.shape[2]) <= last[b, t]
                seen = seen if there is None else seen & there[b]
                if seen.any():
                    k = key[b, kv].double()[seen] * (1 if k_scale is None else k_scale.double())
                    v = value[b, kv].double()[seen] * (1 if v_scale is None else v_scale.double())
                    out[b, t, h] = (k @ query[b, h, t].double() * scaling).softmax(0) @ v
    return out


shapes = {
    "batch": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "groups": st.sampled_from([1, 2, 5, 16]),
    "seq": st.integers(1, 8),
    "width": st.sampled_from([8, 16, 40, 128]),
    "slots": st.sampled_from([1, 7, 65, 200, 300, 301]),
    "room": st.sampled_from([0, 9]),
    "holes": st.booleans(),
    "narrow": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**shapes)
def test_the_reference_is_the_formula(**shape):
    args = make_inputs(**shape, dtype=torch.float32)
    torch.testing.assert_close(decode_attention(*args).double(), formula(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
def test_strides_of_torchs_kernels(monkeypatch, holes):
    """Some of them give their output with the heads behind the tokens."""
    args = make_inputs(2, 2, 2, 3, 8, 20, 0, holes, False, torch.float32, 0)
    expected = decode_attention(*args)
    plain = F.scaled_dot_product_attention
    turned = lambda *a, **k: plain(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", turned)
    assert decode_attention(*args).equal(expected)


@some
@given(programs=st.sampled_from([1, 3, 1000]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), **shapes)
def test_the_kernel(check, programs, dtype, **shape):
    """However many programs share the slots."""
    args = make_inputs(**shape, dtype=dtype)
    module = sys.modules[f"{registry._bundle().__name__}.decode_attention"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PROGRAMS", programs)
        check("decode_attention", args, grad=False)


@pytest.mark.parametrize("narrow", [False, True])
def test_what_nobody_sees_counts_for_nothing(narrow):
    """To the bit: other stale numbers, holes or more room change nothing, and a query that sees nothing gives zeros."""
    args = make_inputs(3, 2, 4, 3, 16, 200, 0, True, narrow, torch.float32, 3)
    query, key, value, last, there, *rest = (a.to(DEVICE) if torch.is_tensor(a) else a for a in args)
    last[0], there[1] = torch.arange(70, 73, device=DEVICE), False
    with use_kernels("triton"):
        found = registry.decode_attention(query, key, value, last, there, *rest)
        seen = (torch.arange(200, device=DEVICE) <= last[:, -1:]) & there
        hidden = ~seen[:, None, :, None].expand_as(key)
        changed = [torch.where(hidden, 448.0, t.float()).to(t.dtype) for t in (key, value)]
        assert registry.decode_attention(query, *changed, last, there, *rest).equal(found)
        assert not found[1].any() and found[0].any()
        assert registry.decode_attention(query, key, value, last - 300, there, *rest).eq(0).all()


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_small_weights_and_queries_of_any_size_with_fp8(check, monkeypatch, size):
    """One key draws nearly all weight, thousands share the rest: none of it may be lost to the range of float16."""
    monkeypatch.setattr(sys.modules[f"{registry._bundle().__name__}.decode_attention"], "_MOST_SPLITS", 1)
    slots = 4096
    key, value = torch.zeros(1, 1, slots, 16), torch.ones(1, 1, slots, 16)
    key[0, 0, 5, 0], value[0, 0, 5] = 224.0, 0.0
    query = torch.zeros(1, 1, 1, 16)
    query[..., 0] = size
    scaling = 17.5 / (224 * size)  # e^-17.5 is a weight that float16 does not hold
    one, last = torch.ones(()), torch.full((1, 1), slots - 1)
    args = [query.bfloat16(), key.to(FP8), value.to(FP8), last, None, scaling, one, one]
    torch.testing.assert_close(decode_attention(*args).max().item(), (slots - 1) * math.exp(-17.5), rtol=0.1, atol=0)
    check("decode_attention", args, grad=False)


def test_empty():
    query, key, value, last, *rest = make_inputs(2, 1, 2, 1, 16, 9, 0, False, False, torch.float32, 0)
    query, key, value, last = (t.to(DEVICE) for t in (query, key, value, last))
    with use_kernels("triton"):
        assert registry.decode_attention(query[:0], key[:0], value[:0], last[:0], *rest).shape == (0, 1, 2, 16)
        assert not registry.decode_attention(query, key[:, :, :0], value[:, :, :0], last, *rest).any()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q, k, v: (q.requires_grad_(), k, v), "no gradient"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: (q, k, v.float()), "torch.bfloat16"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), "`key` has strides"),
        (lambda q, k, v: (q, k.to(FP8), v.to(FP8)), "`k_scale` and `v_scale` with FP8"),
        (lambda q, k, v: (q, k, v, torch.ones((), device=DEVICE)), "only then"),
        (lambda q, k, v: (q, *(F.pad(t, (1, 0)).to(FP8)[..., 1:] for t in (k, v)), *torch.ones(2, device=DEVICE)), "begin at odd places"),
        (lambda q, k, v: [t.repeat(1, 1, 1, 20) for t in (q, k, v)], "head_dim 320"),
    ],
)  # fmt: skip
def test_refused(change, words):
    args = make_inputs(2, 1, 2, 1, 16, 9, 0, False, False, torch.bfloat16, 0)
    args = [a.to(DEVICE) if torch.is_tensor(a) else a for a in args]
    query, key, value, *scales = change(*args[:3])
    with use_kernels("triton"), pytest.raises(KernelError, match=words):
        registry.decode_attention(query, key, value, *args[3:6], *scales)


def test_operator_registration():
    args = make_inputs(2, 2, 2, 3, 16, 70, 5, True, False, torch.float32, 0)
    args = [a.to(DEVICE) if torch.is_tensor(a) else a for a in args]
    torch.library.opcheck(registry._bundle()._ops.ops.decode_attention.default, args)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU: the kernels are compiled here")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("batch, seq, slots, filled", [(1, 1, 8192, 8192), (2, 8, 8192, 5000), (1, 4, 131072, 131072), (1, 1, 131072, 300)])  # fmt: skip
def test_the_shapes_of_super(check, batch, seq, slots, filled, narrow):
    """And a graph recorded for one filling serves others, giving the same bits every time."""
    args = make_inputs(batch, 2, 16, seq, 128, slots, 0, True, narrow, torch.bfloat16, 0)
    args = [a.cuda() if torch.is_tensor(a) else a for a in args]
    args[3].copy_(torch.arange(filled - seq, filled))
    check("decode_attention", args, grad=False)
    with use_kernels("triton"):
        expected = registry.decode_attention(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = registry.decode_attention(*args)
        for last in (filled - seq, 17, filled - seq):
            args[3].copy_(torch.arange(last, last + seq))
            graph.replay()
            assert found.equal(registry.decode_attention(*args))
        assert found.equal(expected)
