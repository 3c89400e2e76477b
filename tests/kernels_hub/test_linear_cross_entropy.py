"""Cross entropy from hidden states against the whole logits, differentiated by autograd; and how much it holds at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.linear_cross_entropy import linear_cross_entropy


def make_inputs(tokens, width, vocab, dtype=torch.float64, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, upstream


def plain(hidden, weight, targets):
    return F.cross_entropy(hidden.double() @ weight.double().t(), targets, ignore_index=-100, reduction="none")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 20), width=st.integers(1, 9), vocab=st.integers(1, 30), chunk=st.integers(1, 21),
    seed=st.integers(0, 2**16), ignored=st.sampled_from([0.0, 0.4, 1.0]),
)  # fmt: skip
def test_losses_and_gradients(tokens, width, vocab, chunk, seed, ignored):
    hidden, weight, targets, upstream = make_inputs(tokens, width, vocab, seed=seed, ignored=ignored)
    (total, losses), each = (
        linear_cross_entropy(hidden, weight, targets, upstream, chunk=chunk),
        plain(hidden, weight, targets),
    )
    expected = (each * upstream).sum()
    assert not losses.requires_grad
    torch.testing.assert_close(losses, each.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    grads = (torch.autograd.grad(-2.5 * o, (hidden, weight)) for o in (total, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, upstream, chunk=chunk)[0].equal(total)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen):
    hidden, weight, targets, upstream = make_inputs(12, 5, 17)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, upstream, chunk=5)[0], free)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets), free, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_extreme_logits():
    hidden, weight, targets, _ = make_inputs(8, 4, 11, torch.float32, ignored=0.0)
    with torch.no_grad():
        hidden.mul_(1e3)
    total, losses = linear_cross_entropy(hidden, weight, targets, chunk=3)
    total.backward()
    torch.testing.assert_close(losses.double(), plain(hidden, weight, targets), rtol=1e-5, atol=1e-3)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Outputs in float32; the error is that of rounding logits and their gradient, however many chunks add up."""
    hidden, weight, targets, upstream = make_inputs(300, 32, 64, dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = plain(*exact, targets)
    expected_grads = torch.autograd.grad(expected, exact, upstream)
    for chunk in (300, 7):
        total, found = linear_cross_entropy(hidden, weight, targets, upstream.float(), chunk=chunk)
        assert found.dtype == total.dtype == torch.float32
        grads = torch.autograd.grad(total, (hidden, weight))
        for a, b in zip((found, *grads), (expected, *expected_grads), strict=True):
            assert (a.double() - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def test_float16_keeps_the_small_gradients_of_a_mean():
    """Loss scaling comes after the logits' gradient is rounded, and could not bring back what that lost."""
    hidden, weight, targets, upstream = make_inputs(300, 32, 64, torch.float16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(plain(*exact, targets), exact, upstream)
    total, _ = linear_cross_entropy(hidden, weight, targets, (upstream / 2**20).float())
    grads = torch.autograd.grad(2**20 * total, (hidden, weight))
    for a, b in zip(grads, expected, strict=True):
        assert (a.double() - b).norm() <= 2 * torch.finfo(torch.float16).eps * b.norm()
    total, _ = linear_cross_entropy(hidden, weight, targets, torch.zeros(300))
    assert total == 0 and not any(grad.any() for grad in torch.autograd.grad(total, (hidden, weight)))


def largest_allocation(function) -> int:
    """Bytes of the largest single allocation while `function` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_no_temporary_is_larger_than_a_chunk():
    tokens, width, vocab, chunk = 1000, 8, 500, 50
    hidden, weight, targets, _ = make_inputs(tokens, width, vocab, torch.float32, ignored=0.0)
    whole = largest_allocation(lambda: F.cross_entropy(hidden @ weight.t(), targets).backward())
    chunked = largest_allocation(lambda: linear_cross_entropy(hidden, weight, targets, chunk=chunk)[0].backward())
    assert whole == 4 * tokens * vocab
    assert chunked == 4 * chunk * vocab


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (5, 6), (3,)), r"`hidden` \(3, 4\) and `weight` \(5, 6\)"),
        (((3, 4), (5, 4), (2,)), r"`targets` has shape \(2,\), expected \(3,\)"),
    ],
)
def test_wrong_shapes(shapes, message):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(dtype):
    hidden, weight, targets, _ = make_inputs(9, 4, 7, dtype)
    torch.library.opcheck(
        torch.ops.nemotron_super.linear_cross_entropy.default, (hidden, weight, targets, None, -100, 4, True, True)
    )


def test_weights_have_no_gradient():
    hidden, weight, targets, upstream = make_inputs(4, 3, 5)
    with pytest.raises(ValueError, match="`weights` require a gradient"):
        linear_cross_entropy(hidden, weight, targets, upstream.requires_grad_())
    with pytest.raises(ValueError, match=r"`weights` has shape \(3,\), expected \(4,\)"):
        linear_cross_entropy(hidden, weight, targets, upstream.detach()[:3])
