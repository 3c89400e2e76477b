"""Kernels of other publishers: the calls that reach them, and that a model gives the same with them.

The packages cannot be installed without a compiler for GPUs. Stand-ins of the same names take the documented arguments and
no others, check layouts, and compute in float32 with formulas of their own.
"""

import subprocess
import sys
from types import MethodType, ModuleType

import pytest
import torch
import torch.nn.functional as F
from nemotron_super.kernels_hub import conventions, registry
from nemotron_super.kernels_hub.registry import KernelError, use_kernels
from nemotron_super.modeling.hub_functions import put_in_place

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for packages on a CPU")
PACKAGED = dict.fromkeys(conventions.PACKAGES, "package")
called: list[str] = []


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):  # fmt: skip
    called.append("causal_conv1d_fn")
    batch, channels, length = x.shape
    assert weight.shape[0] == channels and 2 <= weight.shape[1] <= 4 and x.dtype == weight.dtype
    assert activation in ("silu", "swish") and initial_states is None and not return_final_states
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32 and x.stride(1) == 1
    taps = weight.shape[1]
    out = torch.zeros(batch, channels, length, dtype=x.dtype)
    for back in range(taps):
        shifted = F.pad(x, (back, 0))[..., :length]
        if seq_idx is not None:
            shifted = shifted * (seq_idx == F.pad(seq_idx, (back, 0), value=-1)[:, :length]).unsqueeze(1)
        out = out + weight[:, taps - 1 - back, None] * shifted
    return F.silu(out if bias is None else out + bias[:, None])


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    called.append("causal_conv1d_update")
    assert x.dim() == 3 and x.shape[:2] == conv_state.shape[:2] and conv_state.shape[2] >= weight.shape[1] - 1
    window = torch.cat([conv_state, x.to(conv_state.dtype)], -1)
    conv_state.copy_(window[..., x.shape[2] :])
    return causal_conv1d_fn(window.to(x.dtype), weight, bias, activation=activation)[..., -x.shape[2] :]


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    called.append("mamba_chunk_scan_combined")
    batch, length, heads, head_dim = x.shape
    state_size = B.shape[3]
    assert dt.shape == (batch, length, heads) and A.shape == D.shape == (heads,) and B.shape == C.shape
    assert isinstance(chunk_size, int) and z is None and dt_bias is None and not dt_softplus and return_final_states
    assert initial_states is None or initial_states.shape == (batch, heads, head_dim, state_size)
    state = torch.zeros(batch, heads, head_dim, state_size) if initial_states is None else initial_states
    before, outputs = torch.zeros(batch, dtype=torch.int32), []
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32
    B, C = (v.float().repeat_interleave(heads // B.shape[2], 2) for v in (B, C))
    for t in range(length):
        if seq_idx is not None:  # a state belongs to the document of the same id; what is handed in, to document 0
            state = state * (seq_idx[:, t] == before).view(-1, 1, 1, 1)
            before = seq_idx[:, t]
        step = dt[:, t].float()
        state = state * (step * A).exp()[..., None, None] + (step[..., None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1).to(x.dtype), state


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    called.append("selective_state_update")
    batch, heads, head_dim, state_size = state.shape
    assert x.shape == dt.shape == (batch, heads, head_dim) and A.shape == (heads, head_dim, state_size)
    assert D.shape == dt_bias.shape == (heads, head_dim) and B.shape == C.shape == (batch, B.shape[1], state_size)
    assert A.stride()[-2:] == (0, 0) and dt.stride(-1) == dt_bias.stride(-1) == D.stride(-1) == 0 and not dt_softplus
    y, new = mamba_chunk_scan_combined(
        x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], 1, D=D[:, 0], initial_states=state.float(),
        return_final_states=True,
    )  # fmt: skip
    state.copy_(new)
    return y[:, 0]


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    called.append("rmsnorm_fn")
    assert bias is None and not norm_before_gate and x.shape == z.shape
    v = (x * F.silu(z)).unflatten(-1, (-1, group_size))
    return (v / (v.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        called.append("LigerRMSNormFunction")
        # The other modes round before the weight; in place, the input that a residual still needs would be lost.
        assert offset == 0.0 and casting_mode == "gemma" and not in_place
        return X / (X.square().mean(-1, keepdim=True) + eps).sqrt() * W


@pytest.fixture
def installed(monkeypatch):
    """The packages, as far as the registry can tell."""
    triton = "mamba_ssm.ops.triton"
    for module, kernel in (
        ("causal_conv1d", causal_conv1d_fn),
        ("causal_conv1d", causal_conv1d_update),
        (f"{triton}.ssd_combined", mamba_chunk_scan_combined),
        (f"{triton}.selective_state_update", selective_state_update),
        (f"{triton}.layernorm_gated", rmsnorm_fn),
        ("liger_kernel.ops.rms_norm", LigerRMSNormFunction),
    ):
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[:n])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[module], kernel.__name__, kernel, raising=False)
    monkeypatch.setattr(conventions, "INSTALLED", dict.fromkeys(conventions.INSTALLED, True))
    called.clear()
    yield
    for op in registry.OPS.values():
        op.kernels.pop("package", None)


def results(model, ids, documents):
    model.train()
    out = model(ids, labels=ids, use_cache=False)
    grads = torch.autograd.grad(out.loss, list(model.model.parameters()))
    with torch.no_grad():
        packed = model(ids, position_ids=documents, use_cache=False).logits
        read = model.eval()(ids[:, :7], use_cache=True)
        goes_on = model(ids[:, 7:10], past_key_values=read.past_key_values)
        one = model(ids[:, 10:11], past_key_values=goes_on.past_key_values).logits
    return [out.loss, *grads, packed, goes_on.logits, one]


@pytest.fixture
def model_and_tokens(make_model):
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[*range(5), *range(8)], [*range(1), *range(9), *range(3)]])
    return make_model("MEM*E", scale=2.0), ids, documents


def test_a_model_on_installed_packages(installed, model_and_tokens, relative):
    expected = results(*model_and_tokens)
    with use_kernels(**PACKAGED):
        found = results(*model_and_tokens)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5
    assert set(called) == {f.__name__ for f in (
        causal_conv1d_fn, causal_conv1d_update, mamba_chunk_scan_combined, selective_state_update, rmsnorm_fn, LigerRMSNormFunction
    )}  # fmt: skip


def test_why_not(installed, monkeypatch):
    x, weight = torch.ones(1, 4, 12), torch.ones(12, 4)
    assert "package: causal_conv1d serves only where forced" in registry.causal_conv1d.choose(x, weight)[2]
    for args, words in (
        ((x, weight), "12 channels"),
        ((torch.ones(1, 4, 16), torch.ones(16, 5)), "5 taps"),
        ((torch.ones(1, 4, 16).double(), torch.ones(16, 4)), "float64"),
    ):
        with use_kernels(causal_conv1d="package"), pytest.raises(KernelError, match=words):
            registry.causal_conv1d(*args)
    step = [torch.ones(1, 2, 4), torch.ones(1, 2), -torch.ones(2), *[torch.ones(1, 1, 4)] * 2, torch.ones(2)]
    for op, args, words in (
        ("selective_state_update", (torch.ones(1, 2, 4, 4).bfloat16(), *step), "stochastically"),
        (
            "selective_state_update",
            (torch.ones(1, 2, 4, 4), *step[:-1], torch.ones(2).requires_grad_()),
            "no gradient",
        ),
        (
            "causal_conv1d_update",
            (torch.ones(1, 8, 4), torch.ones(1, 8).requires_grad_(), torch.ones(8, 4)),
            "no gradient",
        ),
    ):
        with use_kernels("package"), pytest.raises(KernelError, match=words):
            getattr(registry, op)(*args)
    with use_kernels(topk_routing="package"), pytest.raises(KernelError, match="no package has a kernel"):
        registry.topk_routing(torch.ones(2, 8), torch.ones(8), 2)
    monkeypatch.setitem(conventions.INSTALLED, "causal_conv1d", False)
    with use_kernels(causal_conv1d="package"), pytest.raises(KernelError, match="causal_conv1d is not installed"):
        registry.causal_conv1d(x, weight)


# What `use_kernels=True` of transformers does: `kernelize`, with layers from the bundled repository.

NAMES = [
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "selective_state_update",
    "mamba_split_conv1d_scan_combined",
]


def functions(model):
    return [f for module in model.modules() for f in getattr(module, "_kernel_funcs", {}).values()]


def replaced(model):
    names = {type(f).kernel_layer_name for f in functions(model) if put_in_place(f) is not None}
    norms = [m for m in model.modules() if hasattr(m, "kernel_layer_name")]
    return names | {m.kernel_layer_name for m in norms if m.forward.__func__ is not type(m).forward}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_on_layers_of_the_bundled_repository(as_on_a_gpu, make_model, relative, mode):
    library = pytest.importorskip("kernels")
    model, ids = make_model("M*", scale=2.0), torch.tensor([[5, 17, 3, 60, 22, 9]])

    def results():
        if mode == "train":
            loss = model.train()(ids, labels=ids, use_cache=False).loss
            return [loss, *torch.autograd.grad(loss, list(model.model.parameters()))]
        with torch.no_grad():
            read = model.eval()(ids[:, :5], use_cache=True)
            return [read.logits, model(ids[:, 5:], past_key_values=read.past_key_values).logits]

    expected = results()
    names = [n for n in NAMES if "update" not in n] if mode == "train" else NAMES[:-1]
    served = {n: {"cpu": library.LocalLayerRepository(repo_path=registry.BUNDLE, layer_name=n)} for n in names}
    with library.use_kernel_mapping(served, inherit_mapping=False):
        library.kernelize(
            model, mode=library.Mode.TRAINING if mode == "train" else library.Mode.INFERENCE, device="cpu"
        )
    assert replaced(model) == set(names)
    calls = []
    for function in functions(model):
        if put_in_place(function) is not None:
            kernel, name = function.forward, type(function).kernel_layer_name

            def noted(self, *args, kernel=kernel, name=name, **kwargs):
                calls.append(name)
                return kernel(*args, **kwargs)

            function.forward = MethodType(noted, function)
    for a, b in zip(results(), expected, strict=True):
        assert relative(a, b) < 1e-5
    assert set(calls) == ({"mamba_split_conv1d_scan_combined"} if mode == "train" else set(names) - {"RMSNorm"})
    # Another model keeps its own functions.
    assert all(put_in_place(f) is None for f in functions(type(model)(model.config)))


def test_a_forced_choice_goes_before_what_was_put_in_place():
    args = torch.randn(3, 8), torch.ones(8), 1e-5

    def never(*args):
        raise AssertionError

    with use_kernels("torch"):
        assert torch.equal(registry.rms_norm(*args, hub=never), registry.rms_norm(*args))
    with pytest.raises(AssertionError):
        registry.rms_norm(*args, hub=never)


def test_layers_refuse_what_the_kernels_do_not_do(as_on_a_gpu):
    library = pytest.importorskip("kernels")
    layers = library.get_local_kernel(registry.BUNDLE).layers
    x, weight = torch.ones(1, 4, 6), torch.ones(4, 3)
    with pytest.raises(ValueError, match="`activation` is None"):
        layers.causal_conv1d_fn()(x, weight)
    with pytest.raises(ValueError, match="`conv_state` holds 4 inputs and `weight` has 3 taps"):
        layers.causal_conv1d_update()(x, torch.ones(1, 4, 4), weight, activation="silu")
    state, A = torch.zeros(1, 2, 4, 4), -torch.rand(2, 4, 4)
    step = [torch.ones(1, 2, 4), torch.ones(1, 2, 1).expand(-1, -1, 4), A, *[torch.ones(1, 1, 4)] * 2]
    with pytest.raises(ValueError, match="`A` differs inside a head"):
        layers.selective_state_update()(state, *step)
    with pytest.raises(ValueError, match="norm_before_gate"):
        layers.mamba_split_conv1d_scan_combined()(x, weight, None, *[torch.ones(2)] * 3, 64)
    with pytest.raises(ValueError, match="`initial_states` is given"):
        layers.causal_conv1d_fn()(x, weight, None, "silu", initial_states=torch.ones(1, 4, 2), cu_seq_lens_q=None)
    scan = [torch.ones(1, 4, 2, 4), torch.ones(1, 4, 2), -torch.ones(2), *[torch.ones(1, 4, 1, 4)] * 2, 64]
    for name in ("z", "cu_seqlens"):
        with pytest.raises(ValueError, match=f"`{name}` is given"):
            layers.mamba_chunk_scan_combined()(*scan, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="`state_batch_indices` is given"):
        layers.selective_state_update()(state, *step, state_batch_indices=torch.ones(1))


def test_the_opt_in_of_transformers(tmp_path, make_model):
    """`from_pretrained(..., kernel_config=...)`, and the names: whatever transformers' model lets kernels in for, ours does."""
    pytest.importorskip("kernels")
    make_model("M*").save_pretrained(tmp_path)
    code = f"""
import transformers.utils
from transformers.utils import import_utils, kernel_config
# transformers 5.24 asks for `kernels` 0.18; nothing that is used here differs from the release that is installed.
import_utils.is_kernels_available = transformers.utils.is_kernels_available = lambda *args: True
import kernels
from kernels import backends, variants
cuda = backends.CUDA(version=backends.Version("13.0"))
for module in list(__import__("sys").modules.values()):
    if getattr(module, "__name__", "").startswith("kernels.") and hasattr(module, "_backend"):
        module._backend = lambda: cuda
kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
import torch
import nemotron_super
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.models.nemotron_h import NemotronHConfig, NemotronHForCausalLM

def names(model):
    found = {{m.kernel_layer_name for m in model.modules() if hasattr(m, "kernel_layer_name")}}
    return found | {{type(f).kernel_layer_name for m in model.modules() for f in getattr(m, "_kernel_funcs", {{}}).values()}}

plain = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
theirs = NemotronHForCausalLM(NemotronHConfig(hidden_size=24, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, layer_types=["linear_attention", "full_attention"]))
# There is no rotary embedding here, and the convolution brings its SiLU.
assert names(theirs) - {{"rotary_pos_emb", "SiLU"}} == names(plain) == set({NAMES}), (names(theirs), names(plain))
config = KernelConfig({{"RMSNorm": "{registry.BUNDLE}:RMSNorm"}}, use_local_kernel=True)
plain.set_use_kernels(True, config)
assert plain.use_kernels and "torch-cuda" in plain.model.norm_f.forward.__func__.__code__.co_filename
try:
    plain.set_use_kernels(True, KernelConfig({{"Norm": "{registry.BUNDLE}:RMSNorm"}}, use_local_kernel=True))
except ValueError as error:
    assert "Norm is not registered" in str(error)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("done"), done.stderr[-3000:]
