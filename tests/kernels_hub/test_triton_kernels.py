"""The Triton kernels against float64: in Triton's interpreter on a CPU, compiled where there is a GPU. Small shapes.

The experts of a real model's many tokens need a GPU: see `test_kernels_on_gpu.py`.
"""

import sys

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import topk_routing, use_kernels
from transformers.activations import ACT2FN

pytestmark = pytest.mark.no_cover

DTYPES = [torch.float32, torch.bfloat16]
# The gradient of A is one number a head, a sum over all positions whose terms cancel: rounding decides its last digits.
A_CANCELS = {4: 1e-4}
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Shrinking a failure takes the interpreter minutes.
phases = (Phase.explicit, Phase.generate)
# Compiled, the scan serves powers of two in bfloat16; interpreted, any size up to the largest, in float32 too.
HEAD_DIMS, STATE_SIZES = ([16, 32, 64], [16, 32, 64, 128]) if ON_GPU else ([1, 5, 16, 20, 32], [1, 3, 16, 33, 64])
SCAN_DTYPE = torch.bfloat16 if ON_GPU else torch.float32
P, N = (64, 128) if ON_GPU else (8, 8)
few = settings(max_examples=40 if ON_GPU else 10, deadline=None, derandomize=True, phases=phases)
some = settings(max_examples=60 if ON_GPU else 15, deadline=None, derandomize=True, phases=phases)
seeds = st.integers(0, 2**16)


def normal(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def documents(batch, length, seed, chance=0.2):
    """Ids in no particular order, every document contiguous; the first may be one position long."""
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < chance
    return (begins.cumsum(1) * 7) % 101


def scan_inputs(batch, length, groups, per_group, head_dim, state_size, dtype, seed, strong=False):
    heads = groups * per_group
    x, B, C, D, state = normal(
        seed,
        (batch, length, heads, head_dim),
        (batch, length, groups, state_size),
        (batch, length, groups, state_size),
        (heads,),
        (batch, heads, head_dim, state_size),
    )
    generator = torch.Generator().manual_seed(seed)
    dt = torch.rand(batch, length, heads, generator=generator)
    dt = torch.where(dt < 0.2, dt * 1e-3, dt) * (dt > 0.1)  # some far below 1e-3, some zero
    A = -torch.rand(heads, generator=generator) * (40 if strong else 2)
    return [x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D, 64, state]


@few
@given(
    batch=st.integers(1, 2),
    length=st.sampled_from([1, 2, 17, 63, 64, 65, 128, 150]),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 2),
    head_dim=st.sampled_from(HEAD_DIMS),
    state_size=st.sampled_from(STATE_SIZES),
    with_state=st.booleans(),
    packed=st.booleans(),
    strong=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16] if ON_GPU else DTYPES),
    seed=seeds,
)
def test_chunked_scan(
    check, batch, length, groups, per_group, head_dim, state_size, with_state, packed, strong, dtype, seed
):
    args = scan_inputs(batch, length, groups, per_group, head_dim, state_size, dtype, seed, strong)
    args[7] = args[7] if with_state else None
    args.append(documents(batch, length, seed) if packed else None)
    check("ssd_chunk_scan", args, seed=seed, floors=A_CANCELS)


@pytest.mark.parametrize("place", [0, 1])
def test_gradient_of_one_output_of_the_scan(place):
    """The other one's is zero, without anybody making it."""
    device = "cuda" if ON_GPU else "cpu"
    x, dt, A, B, C, D, _, state = scan_inputs(1, 70, 1, 2, P, N, SCAN_DTYPE, 0)
    args = [t.to(device).requires_grad_() for t in (x, dt, A, B, C, D)]
    grads = []
    for source in ("triton", "torch"):
        with use_kernels(source):
            out = registry.ssd_chunk_scan(*args, 64, state.to(device))[place]
        grads.append(torch.autograd.grad(out.float().square().sum(), args, allow_unused=True, materialize_grads=True))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if ON_GPU else 1e-4, atol=1e-2 if ON_GPU else 1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_chunked_scan_backward_in_segments(check, monkeypatch, packed):
    """What a long sequence does: states are computed again for one segment after another."""
    args = scan_inputs(2, 200, 1, 2, P, N, SCAN_DTYPE, 0)
    check("ssd_chunk_scan", [*args, None], floors=A_CANCELS)
    monkeypatch.setattr(sys.modules["nemotron_h_kernels_bundled.ssd_chunk_scan"], "_SEGMENT", 128)
    check("ssd_chunk_scan", [*args, documents(2, 200, 3, 0.05) if packed else None], floors=A_CANCELS)


@pytest.mark.parametrize("packed", [False, True])
def test_chunked_scan_in_parts(check, monkeypatch, packed):
    """Programs that take some rows or columns of a state, or some heads of a group, in several segments."""
    kernels = sys.modules[f"{registry._bundle().__name__}.ssd_chunk_scan"]
    for name, size in (("_ROWS", 32), ("_WALK_COLUMNS", 32), ("_TOGETHER", 2), ("_SEGMENT", 128)):
        monkeypatch.setattr(kernels, name, size)
    head_dim, state_size = (64, 128) if ON_GPU else (40, 70)
    args = scan_inputs(2, 130, 2, 4, head_dim, state_size, SCAN_DTYPE, 1)
    check("ssd_chunk_scan", [*args, documents(2, 130, 4, 0.05) if packed else None], floors=A_CANCELS)


@some
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 3, 4, 31, 32, 33, 70]),
    channels=st.sampled_from([1, 7, 128, 130]),
    kernel=st.integers(2, 5),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    packed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_convolution(check, batch, length, channels, kernel, with_bias, with_state, packed, dtype, seed):
    x, weight, bias, state = normal(
        seed, (batch, length, channels), (channels, kernel), (channels,), (batch, channels, kernel), dtype=dtype
    )
    ids = documents(batch, length, seed) if packed else None
    check("causal_conv1d", [x, weight, bias if with_bias else None, state if with_state else None, ids], seed=seed)


@some
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 7, 128, 130]),
    kernel=st.integers(2, 5),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_convolution_of_one_token(check, batch, channels, kernel, with_bias, dtype, seed):
    state, x, weight, bias = normal(
        seed, (batch, channels, kernel), (batch, channels), (channels, kernel), (channels,), dtype=dtype
    )
    check("causal_conv1d_update", [state, x, weight, bias if with_bias else None], grad=False, in_place=1)


def as_projected(dt, A, dtype):
    """Steps and decays as a model has them: dt and log(-A), the bias of the step, and limits that some steps meet.

    Steps from 1e-9, where the exponential vanishes beside 1, to where softplus is its argument.
    """
    spread = torch.linspace(-20, 25, dt.numel()).view_as(dt)
    return (dt + spread).to(dtype), A.abs().add(1e-3).log(), dt[0].flatten()[: len(A)] / 3, (1e-6, 20.0)


@some
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 16, 20]),
    state_size=st.sampled_from([1, 3, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    raw=st.booleans(),
    padded=st.booleans(),
    seed=seeds,
)
def test_state_update(check, batch, groups, per_group, head_dim, state_size, dtype, raw, padded, seed):
    heads = groups * per_group
    state, x, dt, A, B, C, D = normal(
        seed,
        *[(batch, heads, head_dim, state_size), (batch, heads, head_dim), (batch, heads), (heads,)],
        *[(batch, groups, state_size), (batch, groups, state_size), (heads,)],
    )
    dt, A, *named = as_projected(dt, A, dtype) if raw else (dt.clamp(min=0), -A.abs(), None, (0.0, float("inf")))
    live = torch.arange(batch) % 2 == 1 if padded else None
    args = [state, x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D, *named, live]
    check("selective_state_update", args, grad=False, in_place=1)


@some
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([0, 1, 2, 33, 700]),
    heads=st.sampled_from([1, 3, 5, 128]),
    dtype=st.sampled_from(DTYPES),
    limited=st.booleans(),
    padded=st.booleans(),
    seed=seeds,
)
def test_step_and_decay(check, batch, length, heads, dtype, limited, padded, seed):
    dt, A, bias = normal(seed, (batch, length, heads), (heads,), (heads,))
    dt, A, _, limit = as_projected(dt, A, dtype)
    lengths = torch.arange(batch) * length // 2 if padded else None
    args = [dt, bias, A, limit if limited else (0.0, float("inf")), lengths]
    check("step_and_decay", args, grad=False)
    found, _ = _steps(*args)
    assert not padded or all(not row[count:].any() for row, count in zip(found, lengths.tolist(), strict=True))


def _steps(dt, *rest):
    """Of a slice of something wider, as a projection gives it."""
    wide = torch.cat([dt, torch.full_like(dt, float("nan"))], -1).to(DEVICE)
    with torch.no_grad(), use_kernels("triton"):
        steps, decay = registry.step_and_decay(
            wide[..., : dt.shape[-1]], *(a.to(DEVICE) if torch.is_tensor(a) else a for a in rest)
        )
    return steps.cpu(), decay


@some
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([1, 3, 16, 100]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_norms(check, lead, groups, group_size, size, gated, dtype, seed):
    width = groups * group_size
    y, z, weight = normal(seed, (*lead, width), (*lead, width), (width,))
    y, z, weight = ((t * s).to(dtype) for t, s in ((y, size), (z, 1), (weight, 1)))
    if gated:
        check("gated_rms_norm", [y, z, weight, 1e-5, group_size], seed=seed)
    else:
        check("rms_norm", [y, weight, 1e-5], seed=seed)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_whose_programs_take_several_rows(check, monkeypatch, dtype, rows):
    """The backward loads a program's next row ahead of time: rows that its programs share evenly, and not."""
    monkeypatch.setattr(sys.modules[f"{registry._bundle().__name__}.rms_norm"], "_WARPS", 4)
    y, z, weight = normal(0, (rows, 48), (rows, 48), (48,), dtype=dtype)
    check("gated_rms_norm", [y, z, weight, 1e-5, 24])  # two programs along the rows
    check("rms_norm", [y, weight, 1e-5])  # four


@some
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 40),
    data=st.data(),
    normalise=st.booleans(),
    scale=st.sampled_from([1.0, 5.0]),
    seed=seeds,
)
def test_routing(check, tokens, experts, data, normalise, scale, seed):
    top_k = data.draw(st.integers(1, min(experts, 22)))
    logits, bias = normal(seed, (tokens, experts), (experts,))
    device = "cuda" if ON_GPU else "cpu"
    logits, bias = logits.to(device), 0.1 * bias.to(device)
    results = []
    for source in ("triton", "torch"):
        leaf = logits.clone().requires_grad_()
        with use_kernels(source):
            weights, index = topk_routing(leaf, bias, top_k, normalise, scale)
        index, order = index.sort(-1)
        weights = weights.gather(1, order)
        towards = torch.sin(torch.arange(weights.numel(), device=device)).view_as(weights)
        results.append((index, weights.detach(), torch.autograd.grad((weights * towards).sum(), leaf)[0]))
    (index, weights, grad), (expected_index, expected_weights, expected_grad) = results
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("experts, top_k", [(1, 1), (2, 1), (40, 22), (64, 64)])
def test_routing_ranks_equals_by_their_index(experts, top_k):
    """Best first; of equal ones the lower index. Signs of every kind: integers stand for the numbers inside."""
    device = "cuda" if ON_GPU else "cpu"
    logits, bias = (t.to(device) for t in normal(0, (3, experts), (experts,)))
    logits[1], logits[2, ::3] = 0.5, -80.0
    bias[::4] = bias[0]
    choice = logits.sigmoid() + bias
    with use_kernels("triton"):
        weights, index = topk_routing(logits, bias, top_k, False)
    expected = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(index, expected)
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, expected))


def test_routing_of_what_is_not_a_number():
    """Indices stay valid: an index out of range would read another tensor's memory."""
    logits = torch.full((3, 6), float("nan"), device="cuda" if ON_GPU else "cpu")
    logits[1, 2:] = 1.0
    with use_kernels("triton"):
        weights, index = topk_routing(logits, torch.zeros(6, device=logits.device), 4)
    assert index.min() >= 0 and index.max() < 6
    assert sorted(index[1].tolist()) == [2, 3, 4, 5]
    assert weights[1].isfinite().all() and weights[0].isnan().all()


@some
@given(
    tokens=st.integers(1, 5),
    experts=st.integers(1, 6),
    data=st.data(),
    width=st.sampled_from([1, 8, 40, 513]),
    intermediate=st.sampled_from([1, 7, 8, 530]),
    routing=st.sampled_from(["any", "one"]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_experts_of_few_tokens(check, tokens, experts, data, width, intermediate, routing, dtype, seed):
    # torch's grouped_mm, the reference on a GPU, wants rows of 16 bytes.
    if ON_GPU and dtype == torch.bfloat16:
        width, intermediate = -(-width // 8) * 8, -(-intermediate // 8) * 8
    top_k = data.draw(st.integers(1, experts))
    x, up, down, weights = normal(
        seed, (tokens, width), (experts, intermediate, width), (experts, width, intermediate), (tokens, top_k)
    )
    if dtype == torch.bfloat16 and (width % 8 or intermediate % 8):
        return
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    index = index[:1].expand(tokens, -1) if routing == "one" else index
    check("moe_experts", [x.to(dtype), index, weights, up.to(dtype), down.to(dtype)], grad=False)


@few
@given(
    tokens=st.integers(9, 150),
    experts=st.integers(1, 6),
    data=st.data(),
    width=st.sampled_from([8, 64, 136]),
    intermediate=st.sampled_from([8, 128, 200]),
    routing=st.sampled_from(["any", "one"]),
    seed=seeds,
)
def test_experts_of_a_prompt(check, tokens, experts, data, width, intermediate, routing, seed):
    """Sorted and multiplied in blocks: an expert without tokens, one with several blocks, and tiles beyond every edge."""
    top_k = data.draw(st.integers(1, experts))
    # So many pairs an expert that torch's grouped_mm would serve need a GPU.
    tokens = min(tokens, 176 * experts // top_k)
    x, up, down, weights = normal(
        seed, (tokens, width), (experts, intermediate, width), (experts, width, intermediate), (tokens, top_k)
    )
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    index = index[:1].expand(tokens, -1) if routing == "one" else index
    # A slice of a wider tensor, as a projection gives it.
    x = torch.cat([x, x], 1).bfloat16()[:, :width]
    bundle = registry._bundle().__name__
    # Otherwise torch's grouped_mm would answer, and be compared with itself.
    on_device = [t.to("cuda" if ON_GPU else "cpu").bfloat16() for t in (x, up, down)]
    assert sys.modules[f"{bundle}.grouped_experts"].serves(on_device[0], experts, *on_device[1:])
    assert index.numel() <= sys.modules[f"{bundle}.moe_experts"]._MOST * experts
    check("moe_experts", [x, index, weights, up.bfloat16(), down.bfloat16()], grad=False)


@few
@given(tokens=st.integers(1, 40), experts=st.integers(2, 6), routing=st.sampled_from(["any", "one"]), seed=seeds)
def test_experts_with_gradients(check, tokens, experts, routing, seed):
    x, up, down, weights = normal(seed, (tokens, 16), (experts, 32, 16), (experts, 16, 32), (tokens, 2))
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(2).indices
    index = index[:1].expand(tokens, -1) if routing == "one" else index
    check("moe_experts", [x.bfloat16(), index, weights, up.bfloat16(), down.bfloat16()], seed=seed)


@pytest.mark.parametrize("tokens, experts, top_k", [(300, 9, 4), (200, 40, 1), (26, 3, 3), (99, 16, 2)])
def test_pairs_are_placed_by_expert_in_order(tokens, experts, top_k):
    """Against a stable sort; the blocks are as long as may be, and hold every row once."""
    grouped = sys.modules[f"{registry._bundle().__name__}.grouped_experts"]
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    if top_k == 1:
        index.clamp_(max=experts // 2)  # leaves experts without a pair
    placed = grouped.place_pairs(index.to("cuda" if ON_GPU else "cpu"), experts, 64)
    keys, order = index.flatten().sort(stable=True)
    assert placed.rows.cpu().tolist() == (order // top_k).tolist()
    assert placed.place.cpu()[order].tolist() == list(range(tokens * top_k))
    expected: list[list[int]] = []
    begins, begin = [], 0
    for expert, count in enumerate(keys.bincount(minlength=experts).tolist()):
        begins.append(len(expected))
        starts = range(begin, begin + count, 64)
        expected += [[expert, start, min(start + 64, begin + count)] for start in starts]
        begin += count
    assert placed.begins.cpu().tolist() == [*begins, len(expected)]
    assert placed.blocks.cpu().tolist()[: 3 * len(expected)] == [value for block in expected for value in block]


@pytest.mark.parametrize("routing", ["any", "one", "avoid"])
def test_experts_in_parts(routing):
    """Weights that come some experts at a time, the last part smaller, give what they give all at once, to the bit."""
    grouped = sys.modules[f"{registry._bundle().__name__}.grouped_experts"]
    tokens, experts, width, inner = 150, 7, 64, 136
    x, up, down = (
        t.to("cuda" if ON_GPU else "cpu").bfloat16()
        for t in normal(0, (tokens, width), (experts, inner, width), (experts, width, inner))
    )
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(2).indices.to(x.device)
    if routing != "any":
        index = index.clamp(5, 5) if routing == "one" else index.clamp(min=3)
    whole, place = grouped.grouped_experts(x, index, (up,), (down,), experts, inner)
    for some in (1, 3, 6):
        parts, again = grouped.grouped_experts(x, index, up.split(some), down.split(some), experts, inner)
        assert parts.equal(whole) and again.equal(place)


def settlement(batch, tokens, seed):
    """How many tokens settle, and how many of them each row keeps: all, or a number that may be larger than there are."""
    generator = torch.Generator().manual_seed(seed)
    settled = int(torch.randint(tokens + 1, (), generator=generator))
    return settled, torch.randint(settled + 2, (batch,), generator=generator) if seed % 4 else None


@some
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 18),
    room=st.integers(1, 18),
    channels=st.sampled_from([1, 7, 128, 130]),
    more=st.sampled_from([0, 3, 130]),
    kernel=st.integers(2, 5),
    with_bias=st.booleans(),
    behind_drafts=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_convolution_replayed(
    check, batch, tokens, room, channels, more, kernel, with_bias, behind_drafts, dtype, seed
):
    state, x, weight, bias, drafts = normal(
        seed, (batch, channels, kernel), (batch, tokens, channels + more), (channels, kernel), (channels,),
        (batch, max(room, tokens), channels + more), dtype=dtype,
    )  # fmt: skip
    args = [state, x, weight, bias if with_bias else None]
    if behind_drafts or not tokens:
        args += [drafts, *settlement(batch, drafts.shape[1], seed)]
    check("causal_conv1d_replay", args, grad=False, in_place=5)


@some
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 8),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 16, 20]),
    state_size=st.sampled_from([1, 3, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from(DTYPES),
    raw=st.booleans(),
    seed=seeds,
)
def test_state_replayed(check, batch, tokens, groups, per_group, head_dim, state_size, dtype, state_dtype, raw, seed):
    settled, kept = settlement(batch, tokens, seed)
    x, dt, A, B, C, D, _, state = scan_inputs(batch, tokens, groups, per_group, head_dim, state_size, dtype, seed)
    dt, A, *named = as_projected(dt, A, dtype) if raw else (dt, A)
    # Written, a state of 16 bits is rounded stochastically, which the kernel does not do.
    args = [state if settled else state.to(state_dtype), x, dt, A, B, C, D, settled, kept, *named]
    check("selective_state_replay", args, grad=False, in_place=1, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replaying_is_stepping(dtype):
    """Drafts that are taken back leave no trace; those that settle are in the state as if they had come one by one."""
    device = "cuda" if ON_GPU else "cpu"
    x, dt, A, B, C, D, _, state = (
        t.to(device) if torch.is_tensor(t) else t for t in scan_inputs(1, 5, 1, 2, 16, 16, dtype, 0)
    )
    window, inputs, taps = (t.to(device) for t in normal(1, (1, 24, 4), (1, 5, 24), (24, 4), dtype=dtype))
    with torch.no_grad(), use_kernels("triton"):
        stepped, stepped_window = state.clone(), window.clone()
        y = torch.stack(
            [registry.selective_state_update(stepped, x[:, t], dt[:, t], A, B[:, t], C[:, t], D) for t in range(5)], 1
        )
        out = torch.stack([registry.causal_conv1d_update(stepped_window, inputs[:, t], taps) for t in range(5)], 1)
        for settled in (0, 2, 5):
            now, now_window = state.clone(), window.clone()
            torch.testing.assert_close(
                registry.selective_state_replay(now, x, dt, A, B, C, D, settled), y[:, settled:]
            )
            drafts, new = inputs.clone(), inputs[:, settled:]
            found = registry.causal_conv1d_replay(now_window, new, taps, None, drafts, settled)
            torch.testing.assert_close(found, out)
            assert torch.equal(drafts, torch.cat([new, inputs[:, 5 - settled :]], 1))
            if settled == 0:
                assert torch.equal(now, state) and torch.equal(now_window, window)
            rest = registry.selective_state_replay(now, *(v[:, settled:] for v in (x, dt)), A, B[:, settled:], C[:, settled:], D)  # fmt: skip
            torch.testing.assert_close(rest, y[:, settled:])
            rest = registry.causal_conv1d_replay(now_window, inputs[:, settled:], taps)
            torch.testing.assert_close(rest, out[:, settled:])
        torch.testing.assert_close(now, stepped)
        assert torch.equal(now_window, stepped_window)


@pytest.mark.parametrize("source", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refused_tokens_leave_no_trace(dtype, source):
    """Rows that keep 0 to 3 of three settled tokens, against each row's own alone; the convolution's refused ones are NaN."""
    x, dt, A, B, C, D, _, state = (
        t.to(DEVICE) if torch.is_tensor(t) else t for t in scan_inputs(4, 5, 1, 2, 16, 16, dtype, 0)
    )
    window, inputs, taps = (t.to(DEVICE) for t in normal(1, (4, 24, 4), (4, 5, 24), (24, 4), dtype=dtype))
    kept = torch.arange(4, device=DEVICE)
    inputs[:, :3].masked_fill_((torch.arange(3, device=DEVICE) >= kept[:, None])[..., None], float("nan"))
    with torch.no_grad(), use_kernels(source):
        now, now_window = state.clone(), window.clone()
        y = registry.selective_state_replay(now, x, dt, A, B, C, D, 3, kept)
        out = registry.causal_conv1d_replay(now_window, inputs[:, 3:], taps, None, inputs.clone(), 3, kept)
        for row in range(4):
            own = [t for t in range(5) if t < row or t >= 3]
            alone, alone_window = state[row : row + 1].clone(), window[row : row + 1].clone()
            args = [t[row : row + 1, own] for t in (x, dt, B, C)]
            expected = registry.selective_state_replay(alone, *args[:2], A, *args[2:], D, row)
            torch.testing.assert_close(y[row : row + 1], expected)
            torch.testing.assert_close(now[row : row + 1], alone)
            expected = registry.causal_conv1d_replay(alone_window, inputs[row : row + 1, own], taps)
            torch.testing.assert_close(out[row : row + 1, own], expected)
            recent = torch.cat([window[row], inputs[row, :row].T], 1)[:, -4:]
            assert torch.equal(now_window[row], recent) and torch.equal(alone_window, window[row : row + 1])
            assert out[row, row:3].eq(0).all()


@some
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    width=st.sampled_from([1, 3, 16, 100]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_norm_with_residual(check, lead, width, size, dtype, seed):
    x, residual, weight = normal(seed, (*lead, width), (*lead, width), (width,))
    check("add_rms_norm", [(x * size).to(dtype), (residual * size).to(dtype), weight.to(dtype), 1e-5], seed=seed)


@some
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    wide=st.booleans(),
    size=st.sampled_from([1e-20, 1.0, 1e15]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_relu_squared(check, shape, wide, size, dtype, seed):
    (x,) = normal(seed, (*shape, 515) if wide else shape)
    check("relu_squared", [(x * size).to(dtype)], seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_squared_has_the_bits_of_torch(dtype):
    device = "cuda" if ON_GPU else "cpu"
    (x,) = (t.to(device) for t in normal(0, (40, 64), dtype=dtype))
    x[0, :5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e30])
    with torch.no_grad(), use_kernels("triton"):
        for laid_out in (x, x.t(), x[:, 3:50]):
            assert torch.equal(registry.relu_squared(laid_out), ACT2FN["relu2"](laid_out))
        assert registry.relu_squared(torch.full_like(x, float("nan"))).isnan().all()


@some
@given(
    lead=st.sampled_from([(1,), (3,), (1, 1), (2, 4), (3, 1)]),
    classes=st.sampled_from([1, 2, 63, 513, 2048, 8192, 8193, 12289]),
    levels=st.sampled_from([2, 300, 10**6]),
    odd=st.sampled_from([[], [float("nan")], [float("inf"), 0.0], [-0.0, 0.0]]),
    low=st.booleans(),
    apart=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_likeliest(lead, classes, levels, odd, low, apart, dtype, seed):
    """The class that torch finds: the first of equals, of zeros of either sign, and of what is not a number."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(levels, (*lead, classes), generator=generator) - levels).to(dtype)
    logits = torch.full_like(logits, -torch.inf) if low else logits
    for value in odd:
        logits[..., torch.randint(classes, (3,), generator=generator)] = value
    logits = logits.to(DEVICE)
    room = torch.full((*lead[:-1], 3 * lead[-1]), -7, device=DEVICE)
    out = room[..., 1::3] if apart else torch.empty(lead, dtype=torch.int64, device=DEVICE)
    with torch.no_grad(), use_kernels("triton"):
        assert registry.likeliest(logits, out) is out
    assert torch.equal(out, logits.argmax(-1))
    assert (room[..., ::3] == -7).all() and (room[..., 2::3] == -7).all()


def round_by_hand(tokens, own, stops, room, place):
    """One row's round, token by token: what is kept, room, newest token, place, drafts that were right."""
    right = 0
    while right < len(own) - 1 and tokens[right + 1] == own[right]:
        right += 1
    taken: list = []
    for token in own[: right + 1]:
        if len(taken) == room:
            break
        taken.append(token)
        if token in stops:
            room = len(taken)
            break
    return len(taken), room - len(taken), taken[-1] if taken else tokens[0], place + len(taken), right


@pytest.mark.parametrize("source", ["triton", "torch"])
@some
@given(
    rows=st.integers(1, 5),
    drafts=st.integers(0, 7),
    stops=st.lists(st.integers(0, 5), max_size=4),
    few_tokens=st.booleans(),
    seed=seeds,
)
def test_keep_drafts(source, rows, drafts, stops, few_tokens, seed):
    generator = torch.Generator().manual_seed(seed)

    def numbers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    count = drafts + 1
    own = numbers(3 if few_tokens else 50, rows, 10)[:, 1 : 1 + count]
    tokens = numbers(60, rows, 8)[:, :count]
    agree = numbers(10, rows, drafts) < 8
    tokens[:, 1:] = torch.where(agree, own[:, :-1], tokens[:, 1:])
    room, places = numbers(9, rows), numbers(100, rows)
    positions = places.unsqueeze(1) + torch.arange(8)
    expected = [
        round_by_hand(*(t[row].tolist() for t in (tokens, own)), stops, int(room[row]), int(places[row]))
        for row in range(rows)
    ]
    news = torch.full((rows, 3), -7)
    padded = torch.tensor([*stops, -1, -1])
    arguments = [tokens, own, padded, room, torch.full((rows,), -7), torch.full((rows,), -7), positions, news[:, 1]]
    if ON_GPU:
        arguments = [t.to(DEVICE) for t in arguments]
    behind = arguments[0][:, 1:].clone()
    with torch.no_grad(), use_kernels(source):
        registry.keep_drafts(*arguments)
    tokens, _, _, room, kept, newest, positions, accepted = arguments
    found = zip(*(t.tolist() for t in (kept, room, tokens[:, 0], positions[:, 0], accepted)), strict=True)
    assert list(found) == expected
    assert newest.tolist() == [max(kept - 1, 0) for kept, *_ in expected]
    assert torch.equal(positions - positions[:, :1], torch.arange(8, device=DEVICE).expand(rows, -1))
    assert torch.equal(tokens[:, 1:], behind)


@some
@given(
    tokens=st.sampled_from([1, 2, 15, 16, 17, 64]),
    width=st.sampled_from([1, 40, 128, 513, 2048]),
    rows=st.sampled_from([1, 7, 32, 70]),
    with_bias=st.booleans(),
    relu2=st.booleans(),
    terms=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_linear_map_of_few_tokens(check, tokens, width, rows, with_bias, relu2, terms, dtype, seed):
    x, weight, bias = normal(seed, (tokens, width), (rows, width), (rows,), dtype=dtype)
    plus = tuple(normal(seed + 1, *[(tokens, rows)] * terms, dtype=dtype)) if terms > 1 else ()
    check("small_batch_linear", [x, weight, bias if with_bias else None, relu2, plus], grad=False)


@some
@given(
    tokens=st.sampled_from([1, 3, 16, 64]),
    width=st.sampled_from([1, 40, 513, 2048]),
    rows=st.lists(st.sampled_from([1, 7, 32, 33, 70]), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_joint_linear_map(check, tokens, width, rows, dtype, seed):
    x, *weights = normal(seed, (tokens, width), *((n, width) for n in rows), dtype=dtype)
    check("joint_linear", [x, tuple(weights)], grad=False)


@some
@given(
    tokens=st.sampled_from([1, 3, 16, 19]),  # each chooses in a program of its own
    hidden=st.sampled_from([1, 40, 513, 2048]),
    experts=st.sampled_from([7, 32, 70]),
    width=st.sampled_from([None, 1, 33, 300]),
    normalise=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
@example(tokens=64, hidden=513, experts=32, width=33, normalise=True, dtype=torch.bfloat16, seed=0)
def test_routing_of_few_tokens(tokens, hidden, experts, width, normalise, dtype, seed):
    """Logits and narrow tokens as exact as their dtypes; the choice is that of the op which only chooses, bit for bit."""
    x, weight, narrowing = normal(seed, (tokens, hidden), (experts, hidden), (width or 1, hidden), dtype=dtype)
    (bias,) = normal(seed + 1, (experts,))
    x, weight, narrowing, bias = (t.to(DEVICE) for t in (x, weight, narrowing, bias))
    given_narrowing = None if width is None else narrowing
    with torch.no_grad(), use_kernels("triton"):
        logits, weights, index, narrow = registry.route_few_tokens(x, weight, bias, given_narrowing, 5, normalise, 2.5)
        expected = registry.topk_routing(logits, bias, 5, normalise, 2.5)
    assert torch.equal(weights, expected[0]) and torch.equal(index, expected[1])
    exact = x.double() @ weight.double().t()
    assert logits.dtype == torch.float32 and (logits - exact).norm() <= 1e-5 * exact.norm()
    if width is None:
        assert narrow is x
    else:
        exact = x.double() @ narrowing.double().t()
        assert narrow.dtype == dtype and (narrow - exact).norm() <= (1e-5 + torch.finfo(dtype).eps) * exact.norm()


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("width", [40, 2048])
def test_terms_are_added_as_in_kernels_of_their_own(width, terms):
    x, weight, *plus = normal(0, (3, width), (70, width), *[(3, 70)] * terms, dtype=torch.bfloat16)
    with use_kernels("triton"), torch.no_grad():
        expected = registry.small_batch_linear(x.to(DEVICE), weight.to(DEVICE))
        plus = tuple(t.to(DEVICE) for t in plus)
        found = registry.small_batch_linear(x.to(DEVICE), weight.to(DEVICE), plus=plus)
    for term in plus:
        expected = term + expected
    assert torch.equal(found, expected)


@some
@given(
    tokens=st.integers(1, 9),
    width=st.sampled_from([1, 8, 33]),
    vocab=st.sampled_from([1, 2, 61, 4096, 16390]),
    chunk=st.sampled_from([1, 4, None]),
    size=st.sampled_from([0.1, 1.0, 20.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_cross_entropy_from_hidden_states(check, tokens, width, vocab, chunk, size, ignored, weighted, dtype, seed):
    hidden, weight = normal(seed, (tokens, width), (vocab, width), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    weights = torch.randn(tokens, generator=generator) if weighted else None
    args = [hidden, (weight * size).to(dtype), targets, weights, -100, chunk]
    check("linear_cross_entropy", args, seed=seed, constant={3})


@pytest.mark.parametrize("tokens", [1, 4095, 4096, 8192, 8193, 12288, 12289, 100_000])
def test_more_logits_at_once_take_no_more_memory(tokens):
    """In lower precision: what is held beside the logits is the weight's gradient, summed over blocks in float32 and then rounded."""
    rows_at_once = sys.modules[f"{registry._bundle().__name__}.linear_cross_entropy"]._rows_at_once
    hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (tokens, 131072))
    rows = rows_at_once(hidden, weight, 0, for_weight=True)
    logits, gradient = 2 * min(rows, tokens) * 131072, 2 * weight.numel()
    assert logits + (gradient if tokens <= rows else 2 * gradient) <= 3 * gradient
    # No block is much shorter than the others, and none shorter than where memory is of no account.
    assert rows >= min(tokens, 2048) and -(-tokens // rows) * rows - tokens < -(-tokens // rows)
    assert rows_at_once(hidden, weight, 0, for_weight=False) == 2048 and rows_at_once(hidden, weight, 7, True) == 7


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_cross_entropy_makes_no_gradient_that_nobody_wants(check, frozen):
    hidden, weight = normal(0, (5, 8), (70, 8), dtype=torch.bfloat16)
    targets = torch.tensor([3, -100, 69, 0, 5])
    for chunk in (2, None):
        check(
            "linear_cross_entropy",
            [hidden, weight, targets, None, -100, chunk],
            grad=frozen != (0, 1),
            constant=frozen,
        )
    ops = registry._bundle()._ops.ops
    device = "cuda" if ON_GPU else "cpu"
    flags = [place not in frozen for place in (0, 1)]
    _, _, *grads = ops.linear_cross_entropy(*(t.to(device) for t in (hidden, weight, targets)), None, -100, 2, *flags)
    assert [bool(g.numel()) for g in grads] == flags


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_cross_entropy_differentiated_again(dtype, factor):
    """Every backward of a kept graph gives the same, whatever was done with what an earlier one gave."""
    device = "cuda" if ON_GPU else "cpu"
    hidden, weight = (t.to(device).requires_grad_() for t in normal(0, (5, 8), (5000, 8), dtype=dtype))
    targets = torch.tensor([3, -100, 69, 0, 4999], device=device)

    def loss():
        with use_kernels("triton"):
            return factor * registry.linear_cross_entropy(hidden, weight, targets)[0]

    expected = torch.autograd.grad(loss(), (hidden, weight))
    kept = loss()
    for number in range(1, 4):
        kept.backward(retain_graph=number < 3)
        for leaf, once in zip((hidden, weight), expected, strict=True):
            torch.testing.assert_close(leaf.grad, number * once, rtol=2 * torch.finfo(dtype).eps, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()


@pytest.mark.skipif(ON_GPU, reason="looks at the host's allocations")
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_cross_entropy_gives_the_gradient_where_it_was_made(factor):
    hidden, weight = (t.requires_grad_() for t in normal(0, (5, 8), (5000, 8)))
    with use_kernels("triton"):
        loss = factor * registry.linear_cross_entropy(hidden, weight, torch.tensor([3, -100, 69, 0, 4999]))[0]
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    taken = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(taken, default=0) < weight.nbytes


def test_targets_and_logits_that_are_no_numbers():
    """A loss that cannot be right is not a number; a target outside of the vocabulary reads nothing."""
    device = "cuda" if ON_GPU else "cpu"
    hidden, weight = torch.randn(4, 8, device=device), torch.randn(20, 8, device=device)
    hidden[3] = float("nan")
    with use_kernels("triton"):
        loss, losses = registry.linear_cross_entropy(hidden, weight, torch.tensor([3, 20, -1, 3], device=device))
    assert losses.isnan().tolist() == [False, True, True, True] and loss.isnan()


def test_slices_of_a_projection(check):
    """Inputs come as slices of one wide tensor: rows that do not touch."""
    device = "cuda" if ON_GPU else "cpu"
    wide, wider = (t.to(device) for t in normal(0, (2, 9, 100), (2, 9, 4 * P + 4 + 4 * N)))
    wider = wider.to(SCAN_DTYPE)
    (weight,) = normal(1, (24,))
    (taps,) = normal(2, (24, 4))
    with torch.no_grad():
        for call in (
            lambda: registry.gated_rms_norm(wide[..., 10:34], wide[..., 40:64], weight.to(device), 1e-5, 8),
            lambda: registry.causal_conv1d(wide[..., 10:34], taps.to(device)),
            lambda: registry.ssd_chunk_scan(
                wider[..., : 4 * P].view(2, 9, 4, P),
                wider[..., 4 * P : 4 * P + 4].abs().float(),
                -torch.ones(4, device=device),
                wider[..., -4 * N : -2 * N].view(2, 9, 2, N),
                wider[..., -2 * N :].view(2, 9, 2, N),
                torch.ones(4, device=device),
            )[0],
        ):
            with use_kernels("triton"):
                found = call()
            with use_kernels("torch"):
                expected = call()
                rounding = max(torch.finfo(found.dtype).eps, 1e-5)
                torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("grad", [False, True])
def test_operator_registration(grad):
    """Fake tensors and autograd agree with what runs, so that compilers may trust the operators."""
    device = "cuda" if ON_GPU else "cpu"

    def leaf(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=grad)

    ops = registry._bundle()._ops.ops
    with use_kernels("triton"):
        test_slices_of_a_projection(None)
    x, B, C = (leaf(1, 20, n, width, dtype=SCAN_DTYPE) for n, width in ((2, P), (1, N), (1, N)))
    dt = torch.rand(1, 20, 2, device=device)
    A = -torch.ones(2, device=device)
    torch.library.opcheck(ops.ssd_chunk_scan.default, (x, dt, A, B, C, leaf(2), None, None))
    torch.library.opcheck(ops.causal_conv1d.default, (leaf(1, 9, 6), leaf(6, 4), leaf(6), leaf(1, 6, 4), None))
    torch.library.opcheck(ops.rms_norm.default, (leaf(3, 8), leaf(3, 8), leaf(8), 1e-5, 4))
    torch.library.opcheck(ops.rms_norm.default, (leaf(3, 8), None, leaf(8), 1e-5, 8))
    torch.library.opcheck(ops.topk_routing.default, (leaf(3, 8), torch.zeros(8, device=device), 2, True, 2.0))
    torch.library.opcheck(ops.relu_squared.default, (leaf(3, 8),))
    pairs = torch.tensor([[0, 1], [2, 1], [2, 0]], device=device)
    matrices = (leaf(3, 16, 8, dtype=torch.bfloat16), leaf(3, 8, 16, dtype=torch.bfloat16))
    torch.library.opcheck(ops.moe_experts.default, (leaf(3, 8, dtype=torch.bfloat16), pairs, leaf(3, 2), *matrices))
    torch.library.opcheck(ops.add_rms_norm.default, (leaf(3, 8), leaf(3, 8), leaf(8), 1e-5))
    targets = torch.tensor([1, -100, 4], device=device)
    counts = torch.rand(3, device=device)
    for weights, chunk in ((None, 2), (counts, 0)):
        args = (leaf(3, 8), leaf(5, 8), targets, weights, -100, chunk, grad, grad)
        torch.library.opcheck(ops.linear_cross_entropy.default, args)
    if not grad:
        torch.library.opcheck(
            ops.likeliest.default, (leaf(2, 3, 9000), torch.zeros(2, 3, dtype=torch.int64, device=device))
        )
        whole = [
            torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((2, 4), (2, 4), 3, 2, 2, 2, (2, 8), 2)
        ]
        torch.library.opcheck(ops.keep_drafts.default, tuple(whole))
        torch.library.opcheck(ops.small_batch_linear.default, (leaf(3, 8), leaf(5, 8), None, True, [leaf(3, 5)]))
        torch.library.opcheck(ops.joint_linear.default, (leaf(3, 8), [leaf(5, 8), leaf(2, 8)]))
        for narrowing in (leaf(6, 8), None):
            args = (leaf(3, 8), leaf(5, 8), torch.zeros(5, device=device), narrowing, 2, True, 2.0)
            torch.library.opcheck(ops.route_few_tokens.default, args)
        state = torch.randn(1, 6, 4, device=device)
        kept, drafts = torch.tensor([1], device=device), torch.randn(1, 4, 8, device=device)
        torch.library.opcheck(
            ops.causal_conv1d_replay.default, (state, leaf(1, 3, 8), leaf(6, 4), None, drafts, 2, kept)
        )
        torch.library.opcheck(
            ops.selective_state_replay.default,
            (
                *(torch.randn(1, 2, 8, 8, device=device), leaf(1, 3, 2, 8), dt[:, :3], A),
                *(leaf(1, 3, 1, 8), leaf(1, 3, 1, 8), leaf(2), 2, kept, leaf(2), 0.0, 1.0),
            ),
        )
        for lengths in (None, torch.tensor([2], device=device)):
            args = (leaf(1, 3, 2), leaf(2), leaf(2), 0.0, 1.0, lengths)
            torch.library.opcheck(ops.step_and_decay.default, args)
        torch.library.opcheck(ops.causal_conv1d_update.default, (state, leaf(1, 6), leaf(6, 4), None))
        state = torch.randn(1, 2, 8, 8, device=device)
        torch.library.opcheck(
            ops.selective_state_update.default,
            (
                *(state, leaf(1, 2, 8), dt[:, 0], A, leaf(1, 1, 8), leaf(1, 1, 8), leaf(2)),
                *(leaf(2), 0.0, 1.0, torch.ones(1, device=device)),
            ),
        )
        index = torch.tensor([[0, 1], [2, 1]], device=device)
        torch.library.opcheck(
            ops.moe_experts_inference.default, (leaf(2, 8), index, leaf(2, 2), leaf(3, 16, 8), leaf(3, 8, 16))
        )
