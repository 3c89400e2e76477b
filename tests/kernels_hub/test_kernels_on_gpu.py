"""The kernels compiled, at the shapes of Nemotron 3 Super and of its relatives, on a GPU."""

import pytest
import torch
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import KernelError, use_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the kernels are compiled here"),
]
DTYPES = [torch.float32, torch.bfloat16]
# The gradient of A is one number a head, a sum over all positions whose terms cancel: rounding decides its last digits.
A_CANCELS = {4: 1e-4}


def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def scan_inputs(batch, length, heads, groups, dtype, packed, head_dim=64, state_size=128):
    dt = torch.nn.functional.softplus(torch.randn(batch, length, heads, device="cuda") - 3)
    ids = None
    if packed:
        ids = (torch.rand(batch, length, device="cuda") < 4 / length).cumsum(1)
    return [
        normal(batch, length, heads, head_dim, dtype=dtype),
        dt,
        -16 * torch.rand(heads, device="cuda"),
        normal(batch, length, groups, state_size, dtype=dtype),
        normal(batch, length, groups, state_size, dtype=dtype),
        normal(heads, dtype=torch.float32),
        128,
        normal(batch, heads, head_dim, state_size, dtype=torch.float32),
        ids,
    ]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch, length, heads", [(1, 1000, 128), (2, 257, 64), (1, 64, 256), (1, 4500, 16)])
def test_chunked_scan(check, batch, length, heads, packed):
    check("ssd_chunk_scan", scan_inputs(batch, length, heads, 8, torch.bfloat16, packed), floors=A_CANCELS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("state_size", [16, 32, 64, 128])
def test_chunked_scan_of_other_widths(check, head_dim, state_size, packed):
    """A state lies in shared memory as narrower tiles, whose addresses are others: with 32 and 64 those of `nemotron-h-tiny`."""
    for batch, length in ((1, 200), (3, 130)):
        args = scan_inputs(batch, length, 16, 4, torch.bfloat16, packed, head_dim, state_size)
        check("ssd_chunk_scan", args, floors=A_CANCELS)
        check("ssd_chunk_scan", [*args[:7], None, args[8]], floors=A_CANCELS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (2, 700), (1, 4097)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(check, dtype, batch, length, packed):
    ids = (torch.rand(batch, length, device="cuda") < 0.01).cumsum(1) if packed else None
    args = [normal(batch, length, 10240, dtype=dtype), normal(10240, 4, dtype=dtype), normal(10240, dtype=dtype)]
    check("causal_conv1d", [*args, normal(batch, 10240, 4, dtype=dtype), ids])


@pytest.mark.parametrize("rows", [1, 7, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(check, dtype, rows):
    check("rms_norm", [normal(rows, 4096, dtype=dtype), normal(4096, dtype=dtype), 1e-5])
    for width, group in ((8192, 1024), (4096, 512)):
        y, z = normal(2, rows, width, dtype=dtype).unbind()
        check("gated_rms_norm", [y, z, normal(width, dtype=dtype), 1e-5, group])


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token(check, dtype, batch):
    args = scan_inputs(batch, 1, 128, 8, dtype, False)
    x, dt, A, B, C, D = (t[:, 0] if t.dim() > 1 else t for t in args[:6])
    check("selective_state_update", [args[7], x, dt, A, B, C, D], grad=False, in_place=1)
    projected = [normal(batch, 128, dtype=dtype) - 4, A.abs().log(), B, C, D, normal(128), (1e-3, 0.1)]
    check("selective_state_update", [args[7], x, *projected], grad=False, in_place=1)
    state, x = normal(batch, 10240, 4, dtype=dtype), normal(batch, 10240, dtype=dtype)
    args = [state, x, normal(10240, 4, dtype=dtype), normal(10240, dtype=dtype)]
    check("causal_conv1d_update", args, grad=False, in_place=1)


@pytest.mark.parametrize("tokens", [1, 300])
def test_router(check, tokens):
    check("router_logits", [normal(tokens, 4096), normal(512, 4096, scale=0.02)])
    logits, bias = normal(tokens, 512, dtype=torch.float32), normal(512, dtype=torch.float32, scale=0.1)
    with use_kernels("triton"):
        weights, index = registry.topk_routing(logits, bias, 22, True, 5.0)
    with use_kernels("torch"):
        expected, expected_index = registry.topk_routing(logits, bias, 22, True, 5.0)
    assert torch.equal(index.sort(-1).values, expected_index.sort(-1).values)
    torch.testing.assert_close(weights.sort(-1).values, expected.sort(-1).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 8, 64])
@pytest.mark.parametrize("hidden, width", [(4096, 1024), (4096, None), (512, 128)])
def test_router_of_few_tokens(tokens, hidden, width):
    x, weight, bias = (
        normal(tokens, hidden),
        normal(512, hidden, scale=0.02),
        normal(512, dtype=torch.float32, scale=0.1),
    )
    narrowing = None if width is None else normal(width, hidden, scale=0.02)
    with use_kernels("triton"), torch.no_grad():
        logits, weights, index, narrow = registry.route_few_tokens(x, weight, bias, narrowing, 22, True, 5.0)
        expected, expected_index = registry.topk_routing(logits, bias, 22, True, 5.0)
    assert torch.equal(weights, expected) and torch.equal(index, expected_index)
    exact = x.double() @ weight.double().t()
    assert (logits - exact).norm() <= 1e-5 * exact.norm()
    if width is not None:
        exact = x.double() @ narrowing.double().t()
        assert (narrow - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()


def experts(tokens, count=512, top_k=22, width=1024, inner=2688, routing="any"):
    index = torch.rand(tokens, count, device="cuda").topk(top_k).indices
    if routing == "one":
        index = index[:1].expand(tokens, -1).contiguous()
    weights = torch.rand(tokens, top_k, device="cuda")
    up, down = normal(count, inner, width, scale=0.03), normal(count, width, inner, scale=0.02)
    return [normal(tokens, width), index, weights, up, down]


@pytest.mark.parametrize("routing", ["any", "one"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 200, 2048, 4096, 4200])
def test_experts(tokens, routing):
    """All three ways against float64, expert by expert: the reference in float64 would hold all weights at once."""
    x, index, weights, up, down = experts(tokens, routing=routing)
    exact = torch.zeros(tokens, 1024, device="cuda", dtype=torch.float64)
    for e in index.unique().tolist():
        token, choice = (index == e).nonzero(as_tuple=True)
        hidden = (x[token].double() @ up[e].double().t()).relu().square()
        exact.index_add_(0, token, weights[token, choice].double()[:, None] * (hidden @ down[e].double().t()))
    errors = {}
    for source in ("triton", "torch"):
        with use_kernels(source), torch.no_grad():
            out = registry.moe_experts(x, index, weights, up, down)
        errors[source] = ((out.double() - exact).norm() / exact.norm()).item()
    assert errors["triton"] <= 2 * errors["torch"] + 1e-5, errors


@pytest.mark.parametrize("tokens", [3, 100])
def test_gradients_of_experts(check, tokens):
    args = experts(tokens, 16, 4, 256, 320)
    leaves = [0, 2, 3, 4]
    exact = [a.double() if i in leaves else a for i, a in enumerate(args)]
    grads = {}
    upstream = normal(tokens, 256)
    for source, values in (("triton", args), ("torch", args), ("exact", exact)):
        values = [v.detach().requires_grad_() if i in leaves else v for i, v in enumerate(values)]
        with use_kernels("torch" if source == "exact" else source):
            out = registry.moe_experts(*values)
        grads[source] = torch.autograd.grad(out, [values[i] for i in leaves], upstream.to(out.dtype))
    for a, b, truth in zip(grads["triton"], grads["torch"], grads["exact"], strict=True):
        error, allowed = (((t.double() - truth).norm() / truth.norm()).item() for t in (a, b))
        assert error <= 2 * allowed + 1e-5, (error, allowed)


@pytest.mark.parametrize("tokens, settled", [(1, 0), (4, 2), (8, 8), (24, 16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_replay(check, batch, tokens, settled):
    x, dt, A, B, C, D, _, state, _ = scan_inputs(batch, tokens, 128, 8, torch.bfloat16, False)
    check("selective_state_replay", [state, x, dt, A, B, C, D, settled], grad=False, in_place=1)
    window, inputs, drafts = normal(batch, 10240, 4), normal(batch, tokens, 10368), normal(batch, 24, 10368)
    args = [window, inputs, normal(10240, 4), normal(10240), drafts, settled]
    check("causal_conv1d_replay", args, grad=False, in_place=5)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_replay_of_what_was_kept(check, batch, kept):
    counts = (kept + torch.arange(batch)) % 4
    x, dt, A, B, C, D, _, state, _ = scan_inputs(batch, 6, 128, 8, torch.bfloat16, False)
    projected = [dt.bfloat16(), (-A).log(), normal(128, dtype=torch.float32), (0.001, 0.1)]
    for step, decay, *named in ([dt, A], projected):
        args = [state, x, step, decay, B, C, D, 3, counts, *named]
        check("selective_state_replay", args, grad=False, in_place=1)
    window, inputs, drafts = normal(batch, 10240, 4), normal(batch, 3, 10368), normal(batch, 8, 10368)
    args = [window, inputs, normal(10240, 4), normal(10240), drafts, 3, counts]
    check("causal_conv1d_replay", args, grad=False, in_place=5)


@pytest.mark.parametrize("rows", [1, 7, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_residual(check, dtype, rows):
    args = [normal(rows, 4096, dtype=dtype), normal(rows, 4096, dtype=dtype), normal(4096, dtype=dtype), 1e-5]
    check("add_rms_norm", args)


@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 64])
@pytest.mark.parametrize("out, width", [(18560, 4096), (4096, 8192), (512, 4096), (100, 72)])
def test_linear_map_of_few_tokens(check, tokens, out, width):
    args = [normal(tokens, width), normal(out, width, scale=0.02), normal(out)]
    check("small_batch_linear", args, grad=False)
    check("small_batch_linear", [*args, True], grad=False)
    check("small_batch_linear", [*args, False, (normal(tokens, out), normal(tokens, out))], grad=False)


@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 64])
@pytest.mark.parametrize("rows, width", [((4096, 256, 256), 4096), ((512, 128, 128), 512), ((4096, 250), 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_linear_map_of_few_tokens(check, dtype, tokens, rows, width):
    weights = tuple(normal(n, width, dtype=dtype, scale=0.02) for n in rows)
    check("joint_linear", [normal(tokens, width, dtype=dtype), weights], grad=False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab, chunk", [(70, 131072, None), (300, 131072, 128), (9, 61, 4), (33, 50257, 16)])
def test_cross_entropy_from_hidden_states(check, tokens, vocab, chunk, dtype, weighted):
    targets = torch.randint(vocab, (tokens,), device="cuda")
    targets[::3] = -100
    weights = torch.rand(tokens, device="cuda") if weighted else None
    hidden, weight = normal(tokens, 1024, dtype=dtype), normal(vocab, 1024, dtype=dtype, scale=0.05)
    check("linear_cross_entropy", [hidden, weight, targets, weights, -100, chunk], constant={3})


def test_cross_entropy_does_not_wait_for_the_host():
    """Forward and backward, in one block and in several, whatever scales the loss."""
    hidden, weight = normal(64, 256).requires_grad_(), normal(1000, 256).requires_grad_()
    targets, items = torch.randint(1000, (64,), device="cuda"), torch.tensor(7.0, device="cuda")

    def step(chunk):
        with use_kernels(linear_cross_entropy="triton"):
            loss, _ = registry.linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        (loss / items).backward()

    for chunk in (None, 16):
        step(chunk)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_everything_is_served_by_triton():
    assert registry.report("cuda").count(" triton ") == len(registry.OPS)


def test_a_forced_kernel_that_cannot_serve_says_so():
    with use_kernels(rms_norm="triton"), pytest.raises(KernelError, match=r"rms_norm.*float64"):
        registry.rms_norm(torch.zeros(2, 8, device="cuda", dtype=torch.float64), torch.ones(8, device="cuda"), 1e-5)


def test_decoding_ops_in_a_cuda_graph():
    """Captured once, replayed with other inputs: no op waits for the host or depends on values."""
    state, conv_state = normal(1, 128, 64, 128, dtype=torch.float32), normal(1, 10240, 4)
    x = normal(1, 4096)
    up, down = normal(64, 512, 256, scale=0.05), normal(64, 256, 512, scale=0.05)
    router, taps, weight = normal(64, 4096, scale=0.02), normal(10240, 4), normal(4096)
    A, D = -torch.ones(128, device="cuda"), torch.ones(128, device="cuda")

    def step(x, state, conv_state):
        h = registry.rms_norm(x, weight, 1e-5)
        xBC = registry.causal_conv1d_update(conv_state, h.repeat(1, 3)[:, :10240].contiguous(), taps)
        heads, B, C = xBC.split([8192, 1024, 1024], -1)
        dt = torch.full((1, 128), 0.1, device="cuda")
        y = registry.selective_state_update(
            state, heads.view(1, 128, 64), dt, A, B.reshape(1, 8, 128), C.reshape(1, 8, 128), D
        )
        y = registry.gated_rms_norm(y.view(1, -1), y.view(1, -1), weight.repeat(2), 1e-5, 1024)
        weights, index = registry.topk_routing(
            registry.router_logits(h, router), torch.zeros(64, device="cuda"), 6, True, 1.0
        )
        return y, registry.moe_experts(h[:, :256], index, weights, up, down)

    with torch.no_grad(), use_kernels("triton"):
        step(x, state.clone(), conv_state.clone())
        inputs = [x.clone(), state.clone(), conv_state.clone()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(*inputs)
        fresh = [normal(1, 4096), normal(1, 128, 64, 128, dtype=torch.float32), normal(1, 10240, 4)]
        for slot, value in zip(inputs, fresh, strict=True):
            slot.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = step(*fresh)
    for a, b in zip((*outputs, *inputs), (*expected, *fresh), strict=True):
        assert torch.equal(a, b)


def test_compiled():
    """`torch.compile` without graph breaks, forward and backward."""
    weight, taps = normal(256).requires_grad_(), normal(256, 4).requires_grad_()

    def work(x):
        h = registry.causal_conv1d(registry.rms_norm(x, weight, 1e-5), taps)
        return registry.gated_rms_norm(h, x, weight, 1e-5, 64).float().square().sum()

    x = normal(2, 40, 256)
    expected = torch.autograd.grad(work(x), [weight, taps])
    found = torch.autograd.grad(torch.compile(work, fullgraph=True)(x), [weight, taps])
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).float().norm() / b.float().norm()).item() < 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim, state_size", [(64, 128), (32, 64)])
def test_a_small_model(make_model, head_dim, state_size, packed):
    """A whole model, prefill, decoding and a training step, with kernels and with the reference."""
    sizes = {"moe_latent_size": 16, "moe_intermediate_size": 16}
    sizes |= {"mamba_head_dim": head_dim, "ssm_state_size": state_size}
    model = make_model("MEM*E", scale=2.0, **sizes).cuda().bfloat16()
    ids = torch.randint(3, 61, (2, 70), device="cuda")
    documents = (torch.arange(70, device="cuda") // 30).expand(2, -1).contiguous() if packed else None
    results = {}
    exact = model.float()
    for source in ("exact", "torch", "triton"):
        exact = exact.float() if source == "exact" else exact.bfloat16()
        with use_kernels("torch" if source == "exact" else source):
            out = exact(ids, labels=ids, seq_idx=documents, use_cache=False)
            grads = torch.autograd.grad(out.loss, list(exact.model.parameters()), allow_unused=True)
        results[source] = torch.cat([out.logits.flatten(), *(g.flatten() for g in grads if g is not None)]).double()
    size = results["exact"].norm()
    error, allowed = ((results[s] - results["exact"]).norm() / size for s in ("triton", "torch"))
    assert error <= 2 * allowed, (error, allowed)
