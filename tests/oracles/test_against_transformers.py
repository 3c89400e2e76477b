"""The whole model against transformers' own Nemotron-H: logits and every parameter's gradient, in float32.

transformers clamps the time step to `time_step_min` in the scan but not in the one-token step (its issue 48989). The
published models have no such bound, so the comparison lifts the clamp; the last two tests show what it does.
"""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from nemotron_super import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h import configuration_nemotron_h as their_configuration
from transformers.models.nemotron_h import modeling_nemotron_h as their_modeling

TOLERANCE = 1e-5


def make_pair(shake, fields, seed=0, scale=4.0, attn="sdpa", lift_clamp=True):
    """Our model and theirs with the same weights."""
    torch.manual_seed(seed)
    ours = NemotronHForCausalLM(NemotronHConfig(**fields))
    theirs = their_modeling.NemotronHForCausalLM(their_configuration.NemotronHConfig(**fields))
    for model in (ours, theirs):
        model.config._attn_implementation = attn
        model.eval()
    shake(ours, scale, seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if lift_clamp:
        for layer in theirs.model.layers:
            if layer.block_type == "linear_attention":
                layer.mixer.time_step_limit = (0.0, float("inf"))
    return ours, theirs


@contextlib.contextmanager
def float64(model):
    """The model in float64 throughout: where it calls `.float()`, it gets float64."""
    model.double()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield
    model.float()


def run(model, **inputs):
    """Logits, loss and gradients by name."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    # A parameter that no path reaches has no gradient in one implementation and a gradient of zeros in the other.
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def assert_agree(ours, theirs, exact_run, relative):
    """Every tensor within 1e-5 of theirs, or else, where float32 noise alone is larger, about as close to float64.

    The noise is that of gradients which are differences of large sums. Two noises are compared there, so either may be
    the smaller by chance: ours may be up to three times theirs.
    """
    exact = None
    for name, tensor in ours.items():
        if relative(tensor, theirs[name]) <= TOLERANCE:
            continue
        event("compared with float64")
        exact = exact or exact_run()
        total = sum(float(t.square().sum()) for t in exact.values()) ** 0.5
        if exact[name].norm() < 1e-12 * total:
            # Zero but for rounding, even in float64: a softmax over one position, a bias before a norm.
            assert tensor.norm() < 1e-6 * total and theirs[name].norm() < 1e-6 * total, name
            continue
        error, their_error = relative(tensor, exact[name]), relative(theirs[name], exact[name])
        assert error <= max(3 * their_error, TOLERANCE), (
            f"{name}: ours {error:.1e}, theirs {their_error:.1e} off float64"
        )


@st.composite
def fields(draw):
    n_group = draw(st.sampled_from([1, 1, 2, 3]))
    topk_group = draw(st.integers(1, n_group))
    experts = n_group * draw(st.integers(2, 4))  # theirs takes the two best of a group
    groups = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([1, 2]))
    return {
        "hybrid_override_pattern": draw(st.text("M*E-", min_size=1, max_size=6)),
        "vocab_size": 53,
        "hidden_size": draw(st.sampled_from([16, 24])),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8])),
        "mamba_num_heads": groups * draw(st.integers(1, 2)),
        "mamba_head_dim": draw(st.sampled_from([4, 8])),
        "ssm_state_size": draw(st.sampled_from([3, 8])),
        "n_groups": groups,
        "conv_kernel": draw(st.sampled_from([2, 4])),
        "use_conv_bias": draw(st.booleans()),
        "chunk_size": draw(st.sampled_from([1, 4, 8, 128])),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, topk_group * experts // n_group))),
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "moe_latent_size": draw(st.sampled_from([None, 8])),
        "moe_intermediate_size": 12,  # theirs multiplies experts in groups, which wants rows of 16 bytes
        "moe_shared_expert_intermediate_size": 12,
        "intermediate_size": 20,
    }


lengths = st.sampled_from([1, 2, 3, 7, 8, 9, 17, 29])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    fields=fields(),
    batch=st.integers(1, 3),
    length=lengths,
    scale=st.sampled_from([3.0, 5.0]),
    attn=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 2**16),
)
def test_logits_and_all_gradients(fields, batch, length, scale, attn, seed, shake, relative):
    ours, theirs = make_pair(shake, fields, seed, scale, attn)
    ids = torch.randint(0, 53, (batch, length))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[:, -1] = ids[:, -1]  # something to predict, whatever was masked
    # The sum of the losses: with one token there is nothing to predict, and a mean would divide by zero.
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": 7}

    def exact_run():
        with float64(ours):
            return run(ours, **inputs)

    assert_agree(run(ours, **inputs), run(theirs, **inputs), exact_run, relative)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    fields=fields(),
    length=st.integers(2, 20),
    attn=st.sampled_from(["eager", "sdpa"]),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_padded_logits_on_real_tokens(fields, length, attn, side, data, shake, relative):
    ours, theirs = make_pair(shake, fields, attn=attn)
    sizes = torch.tensor([length, *data.draw(st.lists(st.integers(1, length), min_size=2, max_size=2))])
    slots = torch.arange(length)
    mask = (slots < sizes[:, None]) if side == "right" else (slots >= length - sizes[:, None])
    inputs = {"input_ids": torch.randint(0, 53, mask.shape), "attention_mask": mask.long(), "use_cache": False}

    def logits(model):
        with torch.no_grad():
            return {"logits": model(**inputs).logits[mask]}

    def exact_run():
        with float64(ours):
            return logits(ours)

    assert_agree(logits(ours), logits(theirs), exact_run, relative)


# Far below time_step_min (1e-3): softplus(-9) is 1.2e-4.
SMALL_STEPS = {
    "hybrid_override_pattern": "M*M",
    "vocab_size": 53,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
}


def make_pair_with_small_steps(shake):
    ours, theirs = make_pair(shake, SMALL_STEPS, lift_clamp=False)
    with torch.no_grad():
        for model in (ours, theirs):
            for layer in model.model.layers:
                if layer.block_type == "linear_attention":
                    layer.mixer.dt_bias.fill_(-9.0)
                    layer.mixer.in_proj.weight[-4:] = 0.0
                    layer.mixer.D.zero_()  # the scan's output is then all that passes
    return ours, theirs


def test_their_clamp_changes_the_function(shake, relative):
    ours, theirs = make_pair_with_small_steps(shake)
    ids = torch.randint(0, 53, (2, 21))
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) > 0.05
        for layer in theirs.model.layers:
            if layer.block_type == "linear_attention":
                layer.mixer.time_step_limit = (0.0, float("inf"))
        assert relative(ours(ids).logits, theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_prefill_and_decode(whose, shake, relative):
    model = make_pair_with_small_steps(shake)[whose == "theirs"]
    ids = torch.randint(0, 53, (2, 21))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :1], use_cache=True)
        steps = [out.logits]
        for t in range(1, ids.shape[1]):
            out = model(ids[:, t : t + 1], cache=out.cache, use_cache=True)
            steps.append(out.logits)
    error = relative(torch.cat(steps, 1), whole)
    if whose == "ours":
        assert error < TOLERANCE
    else:
        assert error > 0.05, "transformers no longer clamps the scan alone: the oracle needs no lifting any more"
