"""What tensors may look like besides large and dense: far apart, misaligned, empty, all on one expert.

Every kernel either gives the reference's result or says why it does not serve.
"""

import math

import pytest
import torch
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import KernelError, use_kernels

pytestmark = pytest.mark.no_cover

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
P, N = (64, 128) if ON_GPU else (4, 4)
FAR = 1 << 30  # elements between neighbours: the third one lies beyond what 32 bits can address
TAPS = 4


def normal(*shape, dtype=DTYPE):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.fixture
def apart(tmp_path):
    """`apart(x, dim)`: x in a storage where neighbours along `dim` are 2^30 elements apart, without the memory for it."""

    def build(x, dim):
        if x.device.type == "cuda":
            far = torch.empty(x.shape[dim] * FAR, dtype=x.dtype, device="cuda")
        else:  # a file without contents takes no space
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            far = torch.from_file(str(path), shared=True, size=x.shape[dim] * FAR, dtype=x.dtype)
        strides = list(torch.empty([1 if d == dim else n for d, n in enumerate(x.shape)]).stride())
        strides[dim] = FAR
        return far.as_strided(x.shape, strides).copy_(x)

    return build


def step_inputs(batch=3, heads=3, groups=3):
    dt, A, D = torch.rand(batch, heads), -torch.rand(heads), torch.rand(heads)
    return (
        normal(batch, heads, P, N, dtype=torch.float32),
        *(normal(batch, heads, P), dt.to(DEVICE), A.to(DEVICE), normal(batch, groups, N), normal(batch, groups, N)),
        D.to(DEVICE),
    )


def scan_inputs(batch=1, length=3, heads=3, groups=3):
    dt, A, D = torch.rand(batch, length, heads), -torch.rand(heads), torch.rand(heads)
    B, C = normal(batch, length, groups, N), normal(batch, length, groups, N)
    return normal(batch, length, heads, P), dt.to(DEVICE), A.to(DEVICE), B, C, D.to(DEVICE)


def replay_inputs():
    x, *rest = scan_inputs()
    return normal(1, 3, P, N, dtype=torch.float32), x, *rest, 2


def conv_replay_inputs(settled=1):
    return normal(1, 16, TAPS), normal(1, 3, 18), normal(16, TAPS), None, normal(1, 3, 18), settled


def expert_inputs(tokens=3, experts=4, index=None):
    weights = torch.rand(tokens, 2, device=DEVICE)
    index = torch.tensor([[0, 1], [3, 1], [1, 0]], device=DEVICE)[:tokens] if index is None else index
    return normal(tokens, 16), index, weights, normal(experts, 8, 16), normal(experts, 16, 8)


def attention_inputs():
    last = torch.arange(3, 6, device=DEVICE).expand(3, -1).contiguous()
    there = torch.rand(3, 7, device=DEVICE) < 0.8
    return normal(3, 6, 3, 16), normal(3, 3, 7, 16), normal(3, 3, 7, 16), last, there, 0.25


def fill_inputs():
    index = torch.tensor([[0, 4], [1, 3], [2, 0]], device=DEVICE)
    return normal(3, 3, 5, 16), normal(3, 3, 5, 16), normal(3, 3, 2, 16), normal(3, 3, 2, 16), index


def draft_inputs():
    tokens, own = (torch.randint(3, (3, 4), device=DEVICE) for _ in range(2))
    rows = [torch.full((3,), n, device=DEVICE) for n in (9, 0, 0, 0)]
    return tokens, own, torch.tensor([2], device=DEVICE), *rows[:3], torch.zeros(3, 4, device=DEVICE).long(), rows[3]


def packed(name, *shape):
    """Random numbers as a checkpoint holds them, the last two dimensions one matrix: codes, block scales of NVFP4, and scales."""
    if name == "fp8":
        return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn), torch.rand(shape[:-2], device=DEVICE)
    *rows, width = shape
    codes = torch.randint(256, (*rows, width // 2), dtype=torch.uint8, device=DEVICE)
    blocks = torch.rand(*rows, width // 16, device=DEVICE).to(torch.float8_e4m3fn)
    return codes, blocks, torch.rand(shape[:-2], device=DEVICE)


# (op, arguments, which of them is torn apart, along which dimension)
FAR_APART = [
    ("rms_norm", lambda: (normal(3, 16), normal(16), 1e-5), 0, 0),
    ("gated_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(16), 1e-5, 8), 1, 0),
    ("add_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(16), 1e-5), 1, 0),
    ("causal_conv1d", lambda: (normal(3, 5, 16), normal(16, TAPS)), 0, 0),
    ("causal_conv1d", lambda: (normal(1, 3, 16), normal(16, TAPS)), 0, 1),
    ("causal_conv1d_update", lambda: (normal(3, 16, TAPS), normal(3, 16), normal(16, TAPS)), 0, 0),
    ("causal_conv1d_update", lambda: (normal(3, 16, TAPS), normal(3, 16), normal(16, TAPS)), 1, 0),
    ("causal_conv1d_replay", conv_replay_inputs, 1, 1),
    ("causal_conv1d_replay", conv_replay_inputs, 4, 1),
    ("step_and_decay", lambda: (normal(3, 5, 16), normal(16), normal(16)), 0, 0),
    ("step_and_decay", lambda: (normal(3, 5, 16), normal(16), normal(16)), 0, 1),
    ("selective_state_update", step_inputs, 0, 0),
    ("selective_state_update", step_inputs, 0, 1),
    ("selective_state_update", step_inputs, 1, 1),
    ("selective_state_update", step_inputs, 4, 1),
    ("selective_state_replay", replay_inputs, 0, 1),
    ("selective_state_replay", replay_inputs, 1, 1),
    ("selective_state_replay", replay_inputs, 1, 2),
    ("selective_state_replay", replay_inputs, 4, 1),
    ("ssd_chunk_scan", scan_inputs, 0, 1),
    ("ssd_chunk_scan", scan_inputs, 0, 2),
    ("ssd_chunk_scan", scan_inputs, 1, 1),
    ("ssd_chunk_scan", scan_inputs, 3, 2),
    ("ssd_chunk_scan", scan_inputs, 4, 1),
    *(("decode_attention", attention_inputs, which, dim) for which in (0, 1, 2) for dim in (0, 1, 2)),
    ("small_batch_linear", lambda: (normal(3, 16), normal(8, 16)), 0, 0),
    ("small_batch_linear", lambda: (normal(16, 16), normal(3, 16)), 1, 0),
    (
        "route_few_tokens",
        lambda: (normal(3, 16), normal(8, 16), torch.zeros(8, device=DEVICE), normal(5, 16), 2),
        0,
        0,
    ),
    ("moe_experts", expert_inputs, 0, 0),
    ("router_logits", lambda: (normal(3, 16), normal(8, 16)), 0, 0),
    ("router_logits", lambda: (normal(16, 16), normal(3, 16)), 1, 0),
    ("topk_routing", lambda: (normal(3, 8, dtype=torch.float32), torch.zeros(8, device=DEVICE), 2), 0, 0),
    ("joint_linear", lambda: (normal(3, 16), [normal(8, 16), normal(5, 16)]), 0, 0),
    ("linear_cross_entropy", lambda: (normal(3, 16), normal(8, 16), torch.tensor([1, -100, 4], device=DEVICE)), 0, 0),
    ("linear_cross_entropy", lambda: (normal(3, 16), normal(3, 16), torch.tensor([1, -100, 2], device=DEVICE)), 1, 0),
    *(("fill_slots", fill_inputs, which, dim) for which, dim in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (3, 2))),
    *(("keep_drafts", draft_inputs, which, 0) for which in (0, 1, 6)),
    *((f"{name}_linear", lambda name=name: (normal(3, 32), *packed(name, 8, 32)), 0, 0) for name in ("fp8", "nvfp4")),
    ("relu_squared", lambda: (normal(3, 16),), 0, 0),
    ("likeliest", lambda: (normal(3, 16), torch.zeros(3, dtype=torch.int64, device=DEVICE)), 0, 0),
    ("likeliest", lambda: (normal(3, 4, 16), torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)), 1, 0),
]


def served(op, args):
    """Results and the arguments, some of which may have been written."""
    with torch.no_grad(), use_kernels("triton"):
        out = getattr(registry, op)(*args)
    return [t for t in (*(out if isinstance(out, tuple) else (out,)), *args) if torch.is_tensor(t)]


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(*(t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)))


@pytest.mark.parametrize("op, build, which, dim", FAR_APART)
def test_neighbours_beyond_32_bits(apart, op, build, which, dim):
    torch.manual_seed(0)
    args = build()
    torn = [a.clone() if torch.is_tensor(a) else a for a in args]
    torn[which] = apart(args[which], dim)
    for found, expected in zip(served(op, torn), served(op, list(args)), strict=True):
        if op == "linear_cross_entropy":  # a product of torch's, which may choose another algorithm for other strides
            torch.testing.assert_close(found, expected)
        else:
            assert equal(found, expected)


@pytest.fixture
def spread(tmp_path):
    """`spread(stack, experts)`: two matrices as first and last of that many, without the memory for those between."""

    def build(stack, experts):
        shape = (experts, *stack.shape[1:])
        if ON_GPU:
            far = torch.empty(shape, dtype=stack.dtype, device="cuda")
        else:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            far = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=stack.dtype).view(shape)
        far[0], far[-1] = stack
        return far

    return build


ON_GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="too much for the interpreter")


# At these widths the last expert lies beyond 2^31 of what its kernel counts in: numbers, or of packed weights bytes and, where few
# tokens in bfloat16 read a weight as a stream, words of eight bytes. Ultra's are 2.5 times 2^31 numbers.
@pytest.mark.parametrize(
    "name, dtype, tokens, experts, inner, width",
    [
        ("moe", DTYPE, 1, 32767, 264, 256),
        pytest.param("moe", torch.bfloat16, 17, 1024, 2064, 1024, marks=ON_GPU_ONLY),
        ("nvfp4", torch.float32, 1, 32767, 288, 512),
        ("fp8", torch.float32, 1, 32767, 272, 256),
        pytest.param("nvfp4", torch.bfloat16, 1, 32767, 1056, 1024, marks=ON_GPU_ONLY),
        pytest.param("fp8", torch.bfloat16, 1, 32767, 528, 1024, marks=ON_GPU_ONLY),
    ],
)
def test_experts_beyond_32_bits(spread, name, dtype, tokens, experts, inner, width):
    torch.manual_seed(0)
    x, weights = normal(tokens, width, dtype=dtype), torch.rand(tokens, 2, device=DEVICE)
    index = torch.tensor([1, 0], device=DEVICE).repeat(tokens, 1)
    if name == "moe":
        near = [normal(2, inner, width, dtype=dtype), normal(2, width, inner, dtype=dtype)]
        far = [spread(stack, experts) for stack in near]
    else:
        near = [packed(name, 2, inner, width), packed(name, 2, width, inner)]
        far = [tuple(spread(t, experts) for t in stack) for stack in near]
    found = served(f"{name}_experts", [x, index * (experts - 1), weights, *far])[0]
    torch.testing.assert_close(found, served(f"{name}_experts", [x, index, weights, *near])[0], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(ON_GPU, reason="backwards take gigabytes of scratch memory at these strides")
@pytest.mark.parametrize("which, dim", [(0, 2), (1, 1), (3, 2), (4, 1)])
def test_gradients_of_the_scan_beyond_32_bits(apart, which, dim):
    torch.manual_seed(0)
    args = scan_inputs()
    grads = []
    for tear in (False, True):
        leaves = [a.clone() for a in args]
        leaves[which] = apart(args[which], dim) if tear else leaves[which]
        # A leaf of its own, and the operator's backward called as autograd calls it: gradients come dense.
        grads.append(
            registry._bundle()._ops.ops.ssd_chunk_scan_backward(torch.ones_like(args[0]), None, *leaves, None, None)
        )
    for found, expected in zip(*grads, strict=True):
        assert torch.equal(found, expected)


def test_tensors_that_begin_anywhere():
    """A view that begins at an odd element, so that no load of several elements is aligned."""
    torch.manual_seed(0)

    def shifted(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)

    for op, build, *_ in FAR_APART:
        args = build()
        wide = [torch.is_tensor(a) and a.is_floating_point() and a.element_size() > 1 for a in args]
        moved = [shifted(a) if w else a for w, a in zip(wide, args, strict=True)]
        for found, expected in zip(served(op, moved), served(op, list(args)), strict=True):
            torch.testing.assert_close(found, expected, msg=op)


# Vectors that may well be a column of something.
@pytest.mark.parametrize(
    "op, build, which",
    [
        ("rms_norm", lambda: (normal(3, 16), normal(16), 1e-5), 1),
        ("gated_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(16), 1e-5, 8), 2),
        ("add_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(16), 1e-5), 2),
        ("causal_conv1d", lambda: (normal(2, 5, 16), normal(16, TAPS), normal(16)), 2),
        ("causal_conv1d_update", lambda: (normal(2, 16, TAPS), normal(2, 16), normal(16, TAPS), normal(16)), 3),
        ("causal_conv1d_replay", lambda: (normal(1, 16, TAPS), normal(1, 3, 18), normal(16, TAPS), normal(16)), 3),
        ("small_batch_linear", lambda: (normal(3, 16), normal(8, 16), normal(8)), 2),
    ],
)
def test_weights_and_biases_with_gaps(op, build, which):
    """Forward and, where there is one, backward."""
    torch.manual_seed(0)
    results, args = [], build()
    grad = op in ("rms_norm", "gated_rms_norm", "add_rms_norm", "causal_conv1d")
    for gaps in (False, True):
        leaves = [a.clone() if torch.is_tensor(a) else a for a in args]
        if gaps:
            wide = torch.full((len(args[which]), 2), torch.nan, dtype=DTYPE, device=DEVICE)
            wide[:, 1] = args[which]
            leaves[which] = wide[:, 1]
        x = leaves[0].requires_grad_(grad)
        with torch.set_grad_enabled(grad), use_kernels("triton"):
            out = getattr(registry, op)(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        results.append([out, *(torch.autograd.grad(out.sum(), x) if grad else ())])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "op, build, words",
    [
        ("ssd_chunk_scan", lambda: (*scan_inputs()[:5], normal(1).float()), "`D` has shape (1,)"),
        ("ssd_chunk_scan", lambda: (*scan_inputs(), 64, normal(1, 3, N, P + 1).float()), "`initial_state` has shape"),
        ("ssd_chunk_scan", lambda: (*scan_inputs(batch=2), 64, None, torch.zeros(1, 3, device=DEVICE)), "`seq_idx` has"),
        ("ssd_chunk_scan", lambda: scan_inputs(heads=4), "4 heads, which are not divisible by the 3 groups"),
        ("causal_conv1d", lambda: (normal(2, 5, 16), normal(16, TAPS), normal(1)), "`bias` has shape (1,)"),
        ("causal_conv1d", lambda: (normal(2, 5, 16), normal(1, TAPS)), "`weight` has shape (1, 4)"),
        ("causal_conv1d", lambda: (normal(2, 5, 16), normal(16, TAPS), None, normal(2, 16, 5)), "`state` has shape"),
        ("moe_experts", lambda: (normal(5, 16), *expert_inputs()[1:]), "`index` has shape (3, 2)"),
        ("moe_experts", lambda: (*expert_inputs()[:4], normal(3, 16, 8)), "`down` has shape (3, 16, 8)"),
        ("fp8_experts", lambda: (normal(5, 16), *expert_inputs()[1:3], packed("fp8", 4, 8, 16), packed("fp8", 4, 16, 8)), "`index` has"),
        ("causal_conv1d_replay", lambda: conv_replay_inputs(4), "`settled` is 4"),
        ("causal_conv1d_replay", lambda: (*conv_replay_inputs()[:3], None, None, 1), "`settled` is 1"),
        ("selective_state_replay", lambda: (*replay_inputs()[:-1], -1), "`settled` is -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(op, build, words):
    """The reference refuses what a kernel leaves to it."""
    for source, error in (("torch", ValueError), ("triton", KernelError)):
        with torch.no_grad(), use_kernels(source), pytest.raises(error) as raised:
            getattr(registry, op)(*build())
        assert words in str(raised.value)


@pytest.mark.parametrize(
    "op, build",
    [
        ("ssd_chunk_scan", lambda: scan_inputs(length=9)),
        ("router_logits", lambda: (normal(3, 16).float(), normal(8, 16).float())),
        ("linear_cross_entropy", lambda: (normal(3, 16).float(), normal(8, 16).float(), torch.tensor([1, 2, 3], device=DEVICE))),
    ],
)  # fmt: skip
def test_autocast_leaves_the_reference_its_precision(op, build):
    torch.manual_seed(0)
    args = build()
    args[0].requires_grad_()
    results = []
    for enabled in (False, True):
        with use_kernels("torch"), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = getattr(registry, op)(*args)
            out = out[0] if isinstance(out, tuple) else out
            results.append([out.detach(), *torch.autograd.grad(out.sum(), args[0])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_gradient_of_any_input_is_seen():
    for op, args, which in (
        ("small_batch_linear", (normal(3, 16), normal(8, 16), normal(8)), 2),
        ("small_batch_linear", (normal(3, 16), normal(8, 16), None, False, [normal(3, 8)]), 4),
        ("causal_conv1d_update", (normal(2, 16, TAPS), normal(2, 16), normal(16, TAPS), normal(16)), 3),
        ("selective_state_update", step_inputs(), 6),
        ("selective_state_replay", replay_inputs(), 5),
    ):
        wanted = args[which]
        (wanted[0] if isinstance(wanted, list) else wanted).requires_grad_()
        with use_kernels("triton"), pytest.raises(KernelError, match="no gradient"):
            getattr(registry, op)(*args)


@pytest.mark.parametrize("index", [[[1, 2], [1, 2], [1, 2]], [[3, 0], [0, 3], [3, 0]]])
def test_all_tokens_on_the_same_experts(check, index):
    """The other experts have no token."""
    check("moe_experts", list(expert_inputs(index=torch.tensor(index))), grad=False)


def test_nothing_at_all():
    """No rows, no tokens, no positions: empty results, as the reference gives them."""
    weight, taps = normal(16), normal(16, TAPS)
    empty = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    for op, args in (
        ("rms_norm", (normal(0, 16), weight, 1e-5)),
        ("gated_rms_norm", (normal(2, 0, 16), normal(2, 0, 16), weight, 1e-5, 8)),
        ("add_rms_norm", (normal(0, 16), normal(0, 16), weight, 1e-5)),
        ("causal_conv1d", (normal(2, 0, 16), taps)),
        ("causal_conv1d", (normal(0, 5, 16), taps)),
        ("causal_conv1d_update", (normal(0, 16, TAPS), normal(0, 16), taps)),
        ("causal_conv1d_replay", (normal(0, 16, TAPS), normal(0, 2, 16), taps)),
        ("selective_state_update", step_inputs(batch=0)),
        ("topk_routing", (normal(0, 8, dtype=torch.float32), normal(8, dtype=torch.float32), 2)),
        ("small_batch_linear", (normal(0, 16), normal(8, 16))),
        ("joint_linear", (normal(0, 16), [normal(8, 16), normal(5, 16)])),
        ("route_few_tokens", (normal(0, 16), normal(8, 16), normal(8, dtype=torch.float32), normal(5, 16), 2)),
        ("relu_squared", (normal(0, 16),)),
        ("likeliest", (normal(0, 16), empty[:, 0])),
        ("linear_cross_entropy", (normal(0, 16), normal(8, 16), empty[:, 0])),
    ):
        found = served(op, [a.clone() if torch.is_tensor(a) else a for a in args])
        with torch.no_grad(), use_kernels("torch"):
            expected = getattr(registry, op)(*args)
        for a, b in zip(found, (*(expected if isinstance(expected, tuple) else (expected,)), args[0]), strict=False):
            assert a.shape == b.shape and a.dtype == b.dtype and (a.numel() == 0 or not a.any()), op
    nobody = (normal(0, 16), empty, torch.empty(0, 2, device=DEVICE), *expert_inputs()[3:])
    assert served("moe_experts", nobody)[0].shape == (0, 16)
    with use_kernels("triton"), pytest.raises(KernelError, match="`x` is empty"):
        registry.ssd_chunk_scan(*scan_inputs(length=0))


def test_documents_of_one_token_and_of_none(check):
    """Ids that skip numbers, as where documents of length zero were dropped, and documents of a single position."""
    args = [*scan_inputs(length=9), 64, None, torch.tensor([[4, 7, 7, 9, 12, 12, 12, 13, 20]])]
    check("ssd_chunk_scan", args, floors={4: 1e-4})
    check("causal_conv1d", [normal(1, 9, 16), normal(16, TAPS), None, None, args[-1]])


@pytest.mark.parametrize("source", ["torch", "triton"])
def test_what_padding_holds_does_not_matter(source):
    """Time steps behind a row's tokens, and weights of tokens that have nothing to predict, may be no numbers."""
    dt = torch.zeros(2, 3, 4, device=DEVICE)
    dt[0, 2], dt[1, 1:] = torch.inf, torch.nan
    hidden, weight = normal(3, 16).requires_grad_(), normal(8, 16)
    targets = torch.tensor([1, -100, 4], device=DEVICE)
    with use_kernels(source):
        with torch.no_grad():
            steps, _ = registry.step_and_decay(dt, dt[0, 0], dt[0, 0], lengths=torch.tensor([2, 1], device=DEVICE))
        results = []
        for none in (0.0, torch.inf):
            loss, _ = registry.linear_cross_entropy(
                hidden, weight, targets, torch.tensor([0.5, none, 2.0], device=DEVICE)
            )
            results.append((loss, *torch.autograd.grad(loss, hidden)))
    assert not steps[0, 2].any() and not steps[1, 1:].any()
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def with_shape(args, which, shape):
    """The arguments with one of another shape."""
    changed = list(args)
    changed[which] = normal(*shape).to(changed[which].dtype)
    return changed


@pytest.mark.parametrize(
    "op, args, words",
    [
        ("causal_conv1d_replay", lambda: conv_replay_inputs(4), "`settled` is 4"),
        ("causal_conv1d_replay", lambda: (*conv_replay_inputs()[:4], normal(1, 2, 18), 1), "has to take `x`"),
        ("selective_state_replay", lambda: (*replay_inputs()[:-1], -1), "`settled` is -1"),
        ("selective_state_replay", lambda: (replay_inputs()[0].half(), *replay_inputs()[1:]), "rounded stochastically"),
        ("selective_state_replay", lambda: (replay_inputs()[0].mT, *replay_inputs()[1:]), "`state` has strides"),
        ("small_batch_linear", lambda: (normal(65, 16), normal(8, 16)), "up to 64 tokens"),
        ("small_batch_linear", lambda: (normal(3, 16), normal(8, 16).double()), "float64"),
        ("joint_linear", lambda: (normal(65, 16), [normal(8, 16)] * 2), "up to 64 tokens"),
        ("joint_linear", lambda: (normal(3, 16), [normal(8, 16), normal(8, 16).double()]), "float64"),
        ("joint_linear", lambda: (normal(3, 16), [normal(8, 16)] * 4), "4 weights"),
        ("route_few_tokens", lambda: (normal(65, 16), normal(8, 16), normal(8).float(), None, 2), "up to 64 tokens"),
        ("route_few_tokens", lambda: (normal(3, 16), normal(8, 16), normal(8).float(), normal(5, 16).double(), 2), "float64"),
        ("route_few_tokens", lambda: (normal(3, 16), normal(8, 16), normal(8).float(), None, 2, True, 1.0, 4), "`n_group` is 4"),
        ("fp8_linear", lambda: (normal(3, 17), *packed("fp8", 1, 17)), "in multiples of 8"),
        ("fp8_linear", lambda: (normal(3, 16), packed("fp8", 1, 17)[0][0, 1:].view(1, 16), normal().float()), "begins at byte 1 "),
        ("add_rms_norm", lambda: (normal(3, 16), normal(3, 16).double(), normal(16), 1e-5), "float64"),
        ("add_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(15), 1e-5), "`weight` has shape (15,)"),
        ("rms_norm", lambda: (normal(3, 16), normal(17), 1e-5), "`weight` has shape (17,)"),
        ("gated_rms_norm", lambda: (normal(3, 16), normal(3, 8), normal(16), 1e-5, 8), "`z` has shape (3, 8)"),
        ("gated_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(8), 1e-5, 8), "`weight` has shape (8,)"),
        ("gated_rms_norm", lambda: (normal(3, 16), normal(3, 16), normal(16), 1e-5, 7), "groups of 7"),
        ("step_and_decay", lambda: (normal(1, 3, 4), normal(4), normal(3), (0.0, 1.0), None), "`A_log` has shape (3,)"),
        ("step_and_decay", lambda: (normal(1, 3, 4), normal(1), normal(4), (0.0, 1.0), None), "`dt_bias` has shape (1,)"),
        ("causal_conv1d_update", lambda: (normal(2, 8, 4), normal(2, 9), normal(8, 4)), "`x` has shape (2, 9)"),
        ("causal_conv1d_update", lambda: (normal(2, 8, 4), normal(2, 8), normal(8, 3)), "`weight` has shape (8, 3)"),
        ("causal_conv1d_update", lambda: (normal(2, 8, 4), normal(2, 8), normal(8, 4), normal(7)), "`bias` has shape (7,)"),
        ("causal_conv1d_replay", lambda: (normal(2, 8, 4), normal(2, 3, 7), normal(8, 4)), "`x` has shape (2, 3, 7)"),
        ("causal_conv1d_replay", lambda: (normal(2, 8, 4), normal(2, 3, 8), normal(7, 4)), "`weight` has shape (7, 4)"),
        ("causal_conv1d_replay", lambda: (normal(2, 8, 4), normal(2, 3, 8), normal(8, 4), normal(7)), "`bias` has shape (7,)"),
        ("selective_state_update", lambda: with_shape(step_inputs(), 1, (3, 3, 9)), "`x` has shape (3, 3, 9)"),
        ("selective_state_update", lambda: with_shape(step_inputs(), 2, (2, 3)), "`dt` has shape (2, 3)"),
        ("selective_state_update", lambda: with_shape(step_inputs(), 3, (1,)), "`A` has shape (1,)"),
        ("selective_state_update", lambda: with_shape(step_inputs(), 4, (3, 2, N)), "`B` has shape (3, 2, "),
        ("selective_state_update", lambda: with_shape(step_inputs(), 5, (3, 1, N)), "`C` has shape (3, 1, "),
        ("selective_state_update", lambda: with_shape(step_inputs(), 6, (5,)), "`D` has shape (5,)"),
        ("selective_state_replay", lambda: with_shape(replay_inputs(), 6, (9,)), "`D` has shape (9,)"),
        ("topk_routing", lambda: (normal(3, 8).float(), normal(1).float(), 2), "`bias` has shape (1,)"),
        ("topk_routing", lambda: (normal(3, 8).float(), normal(8).float(), 9), "`top_k` is 9"),
        ("router_logits", lambda: (normal(3, 16).float(), normal(8, 15).float()), "`weight` (8, 15)"),
        ("route_few_tokens", lambda: (normal(3, 16), normal(8, 16), normal(7).float(), None, 2), "`bias` has shape (7,)"),
        ("small_batch_linear", lambda: (normal(3, 16), normal(8, 15)), "`weight` (8, 15)"),
        ("small_batch_linear", lambda: (normal(3, 16), normal(8, 16), normal(7)), "`bias` has shape (7,)"),
        ("joint_linear", lambda: (normal(3, 16), [normal(8, 16), normal(8, 15)]), "`weight` (8, 15)"),
        ("small_batch_linear", lambda: (normal(3, 16), normal(8, 16), None, False, (normal(3, 7),)), "`plus` has shape (3, 7)"),
        ("fp8_linear", lambda: (normal(3, 16), *packed("fp8", 8, 24)), "`weight` has 24 inputs, and 16 come"),
        ("nvfp4_linear", lambda: (normal(3, 16), *packed("nvfp4", 8, 32)), "`weight` has 32 inputs, and 16 come"),
        ("nvfp4_linear", lambda: with_shape((normal(3, 32), *packed("nvfp4", 8, 32)), 2, (8, 1)), "scale` has shape (8, 1)"),
        ("fp8_linear", lambda: with_shape((normal(3, 16), *packed("fp8", 8, 16)), 2, (8,)), "scale` has shape (8,)"),
        ("fp8_experts", lambda: (*expert_inputs()[:3], packed("fp8", 4, 8, 24), packed("fp8", 4, 16, 8)), "`up` has 24 inputs"),
        ("fp8_experts", lambda: (*expert_inputs()[:3], packed("fp8", 4, 8, 16), packed("fp8", 4, 16, 16)), "`down` has 16 inputs"),
        ("fp8_experts", lambda: (*expert_inputs()[:3], packed("fp8", 4, 8, 16), packed("fp8", 3, 16, 8)), "`down` is (3, 16, 8)"),
        ("likeliest", lambda: (normal(3, 16), torch.zeros(2, dtype=torch.int64, device=DEVICE)), "`out` has shape (2,)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 0, (3, 5)), "`tokens` has shape (3, 5)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 4, (2,)), "`kept` has shape (2,)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 6, (2, 4)), "`positions` has shape (2, 4)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 3, (2,)), "`room` has shape (2,)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 5, (4,)), "`newest` has shape (4,)"),
        ("keep_drafts", lambda: with_shape(draft_inputs(), 7, (3, 1)), "`accepted` has shape (3, 1)"),
        ("fill_slots", lambda: with_shape(fill_inputs(), 3, (3, 3, 3, 16)), "`new_values` has shape (3, 3, 3, 16)"),
        ("decode_attention", lambda: with_shape(attention_inputs(), 1, (3, 4, 7, 16)), "`key` (3, 4, 7, 16)"),
        ("decode_attention", lambda: with_shape(attention_inputs(), 2, (3, 3, 8, 16)), "`value` has shape (3, 3, 8, 16)"),
        ("decode_attention", lambda: with_shape(attention_inputs(), 3, (1, 3)), "`last` has shape (1, 3)"),
        ("decode_attention", lambda: with_shape(attention_inputs(), 4, (3, 6)), "`there` has shape (3, 6)"),
        ("fill_slots", lambda: with_shape(fill_inputs(), 4, (1, 2)), "`index` has shape (1, 2)"),
        ("fill_slots", lambda: (normal(3, 4, 5, 16), normal(3, 4, 5, 16), *fill_inputs()[2:]), "`keys` has shape (3, 4, 5, 16)"),
        ("fill_slots", lambda: with_shape(fill_inputs(), 1, (3, 3, 6, 16)), "`values` has shape (3, 3, 6, 16)"),
        ("linear_cross_entropy", lambda: (normal(3, 16), normal(8, 16), torch.zeros(3, device=DEVICE)), "wants int64"),
        ("linear_cross_entropy", lambda: (normal(3, 16), normal(8, 15), torch.zeros(3, device=DEVICE).long()), "(8, 15)"),
    ],
)  # fmt: skip
def test_refused(op, args, words):
    with torch.no_grad(), use_kernels("triton"), pytest.raises(KernelError) as error:
        getattr(registry, op)(*args())
    assert words in str(error.value) and op in str(error.value)


@pytest.mark.parametrize("step", [1e2, 1e4, 1e8])
def test_steps_that_forget_all(check, step):
    """Tokens behind them are as exact as without them, and so are gradients."""
    x, dt, A, B, C, D = scan_inputs(length=70)
    dt[:, [5, 40]], x[:, [5, 40]] = step, 0
    check("ssd_chunk_scan", [x, dt, A - 1, B, C, D], floors=dict.fromkeys(range(8), 1e-4))
