"""Small models that are hard to get right by accident, shared by all tests.

All fixtures are of session or module scope, so that hypothesis may use them.
"""

import os

# numpy's BLAS multiplies in Triton's interpreter: like torch below, on one thread, and with no pool of threads that a fork
# in the same process would have to shut down. It has to be said before numpy is imported, which torch does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the Triton kernels are tested in Triton's interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nemotron_super import NemotronHConfig, NemotronHForCausalLM

# Two threads of several test processes on two cores wait for each other far longer than they compute.
torch.set_num_threads(1)

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_latent_size": 12,
    "moe_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size": 20,
    "routed_scaling_factor": 2.5,
}


@torch.no_grad()
def _shake(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Make a fresh model far from linear: large matrices, norms away from 1, time steps from 1e-4 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("dt_bias"):
            tensor.copy_(uniform(tensor, -9.0, 2.0))
        elif name.endswith("A_log"):
            tensor.copy_(uniform(tensor, -1.0, 2.0))
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(uniform(tensor, -0.2, 0.2))
        elif "conv1d" in name:
            tensor.copy_(uniform(tensor, -0.8, 0.8))
        elif tensor.dim() == 1:
            tensor.copy_(uniform(tensor, 0.5, 1.5))
        else:
            tensor.mul_(scale)


@pytest.fixture(scope="session")
def shake():
    """`shake(model, scale, seed)`: replace fresh weights by ones that make every part of the model matter."""
    return _shake


@pytest.fixture(scope="session")
def make_config():
    """`make_config(pattern, **fields)`: a small `NemotronHConfig`."""
    return lambda pattern="MEM*E-M", **fields: NemotronHConfig(
        **{**_SMALL, **fields, "hybrid_override_pattern": pattern}
    )


@pytest.fixture(scope="session")
def make_model(make_config):
    """`make_model(pattern, seed=0, scale=4, exact=False, attn=None, **fields)`: a small model in eval mode.

    `exact` makes it a float64 model, its cached states too; use it together with `exact_floats`.
    """

    def build(pattern="MEM*E-M", seed=0, scale=4.0, exact=False, attn="sdpa", **fields):
        torch.manual_seed(seed)
        config = make_config(pattern, **fields)
        config._attn_implementation = attn
        model = NemotronHForCausalLM(config).eval()
        _shake(model, scale, seed)
        if exact:
            model.double()
            for module in model.modules():
                if hasattr(module, "cache_dtype"):
                    module.cache_dtype = torch.float64
        return model

    return build


@pytest.fixture(scope="module")
def exact_floats():
    """Let `.float()` and `softmax(dtype=float32)` mean float64.

    Float32 noise, grown by routing that flips, hides small leaks; in float64 one part in 10^9 shows.
    """
    with pytest.MonkeyPatch.context() as patch:
        softmax = torch.Tensor.softmax
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "softmax", lambda self, dim, dtype=None: softmax(self.double(), dim))
        yield


@pytest.fixture(scope="session")
def relative():
    """`relative(a, b)`: norm of the difference over the norm of b (the plain norm where b is exactly zero)."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        size = b.norm().item()
        return (a - b).norm().item() / (size or 1.0)

    return error
