"""One definition, two ways: an operator for whoever watches operators, a plain function with the same gradient otherwise."""

import copy
import sys

import pytest
import torch
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import use_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Seen(TorchDispatchMode):
    """Names of the operators that are called while it is entered."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels():
    with use_kernels("triton"):
        yield


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    return [t.to(DEVICE).requires_grad_() for t in (x, weight)]


def normed(x, weight):
    return registry.rms_norm(x * 2, weight, 1e-5).square().sum()


@pytest.fixture
def expected(inputs):
    """The loss, and its gradients, by the reference."""
    leaves = copy.deepcopy(inputs)
    with use_kernels("torch"):
        loss = normed(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def check_gradients(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def operator_name():
    return f"{registry._bundle()._ops.NAMESPACE}::rms_norm"


def test_nobody_pays_for_the_dispatcher_unless_watching(inputs, expected, monkeypatch):
    module = sys.modules[f"{registry._bundle().__name__}.rms_norm"]
    for one in (module._norm, module.norm_backward):
        monkeypatch.setattr(one, "_operator", lambda *args: pytest.fail("nothing watches"))
    loss = normed(*inputs)
    torch.testing.assert_close(loss.detach(), expected[0])
    check_gradients(torch.autograd.grad(loss, inputs), expected[1])


def test_a_dispatch_mode_sees_operators(inputs, expected):
    with Seen() as seen:
        grads = torch.autograd.grad(normed(*inputs), inputs)
    assert operator_name() in seen.names and f"{operator_name()}_backward" in seen.names
    check_gradients(grads, expected[1])


def test_a_compiler_sees_one_operator(inputs, expected):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(normed, backend=backend, fullgraph=True)(*inputs)
    assert operator_name() in {getattr(node.target, "name", str)() for node in graphs[0].graph.nodes if node.op == "call_function"}  # fmt: skip
    check_gradients(torch.autograd.grad(loss, inputs), expected[1])


def test_forward_and_backward_are_compiled_ahead_of_time(inputs, expected):
    loss = torch.compile(normed, backend="aot_eager", fullgraph=True)(*inputs)
    check_gradients(torch.autograd.grad(loss, inputs), expected[1])


def test_a_transform_of_functions_sees_operators(inputs):
    x, weight = (t.detach() for t in inputs)
    with torch.no_grad():
        rows = torch.func.vmap(lambda row: registry.rms_norm(row, weight, 1e-5))(x)
        torch.testing.assert_close(rows, registry.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(inputs, expected, reentrant):
    loss = checkpoint(normed, *inputs, use_reentrant=reentrant)
    loss.backward()
    check_gradients([t.grad for t in inputs], expected[1])


def test_a_graph_may_be_kept(inputs, expected):
    loss = normed(*inputs)
    for _ in range(2):
        check_gradients(torch.autograd.grad(loss, inputs, retain_graph=True), expected[1])


def test_second_derivatives_are_refused(inputs):
    (grad,) = torch.autograd.grad(normed(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"rms_norm_backward.* no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_router_logits_as_an_operator(grad, monkeypatch):
    """Not served on a CPU in bfloat16, which has no product that ends in float32; its shapes and gradient are the same."""
    if DEVICE == "cpu":
        module = sys.modules[f"{registry._bundle().__name__}.topk_routing"]
        monkeypatch.setattr(module, "_product", lambda a, b: a.float() @ b.float())
        monkeypatch.setattr(module, "_split_product", lambda a, b: a @ b.float())
    x, weight = (torch.randn(n, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=grad) for n in (3, 5))
    torch.library.opcheck(registry._bundle()._ops.ops.router_logits.default, (x, weight))
