"""Multi-token prediction against its formulas, written out from the weights alone.

h_k = final_layernorm(moe(attention(eh_proj([enorm(embed(token k ahead)), hnorm(h_{k-1})]))))
"""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("exact_floats")

ONE_DEPTH = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attention(weights, name, x, config):
    batch, length, _ = x.shape
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    q, k, v = ((x @ weights[f"{name}.{p}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for p in "qkv")
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    out = torch.zeros(batch, length, heads, config.head_dim, dtype=x.dtype)
    for t in range(length):
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) * config.head_dim**-0.5
        out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : t + 1])
    return out.flatten(2) @ weights[f"{name}.o_proj.weight"].T


def moe(weights, name, x, config):
    def mlp(up, down, x):
        return down @ (up @ x).clamp(min=0) ** 2

    rows = []
    for token in x.flatten(0, 1):
        scores = torch.sigmoid(weights[f"{name}.gate.weight"] @ token)
        chosen = (scores + weights[f"{name}.gate.e_score_correction_bias"]).topk(config.num_experts_per_tok).indices
        latent = weights[f"{name}.fc1_latent_proj.weight"] @ token
        total = sum(
            scores[e] / scores[chosen].sum() * config.routed_scaling_factor
            * mlp(weights[f"{name}.experts.up_proj"][e], weights[f"{name}.experts.down_proj"][e], latent)
            for e in chosen
        )  # fmt: skip
        shared = mlp(*(weights[f"{name}.shared_experts.{p}_proj.weight"] for p in ("up", "down")), token)
        rows.append(weights[f"{name}.fc2_latent_proj.weight"] @ total + shared)
    return torch.stack(rows).view_as(x)


def written_out(model, ids, depths):
    """MTP logits of every depth, of "*E" depths, for whole rows."""
    config, weights = model.config, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    h = model.model(ids, use_cache=False).last_hidden_state
    embeds, logits = weights["model.embeddings.weight"][ids], []
    for depth in range(depths):
        first = depth % config.num_nextn_predict_layers * 2
        a, e = f"mtp.layers.{first}", f"mtp.layers.{first + 1}"
        ahead = torch.cat([embeds[:, depth + 1 :], torch.zeros_like(embeds[:, : depth + 1])], 1)[:, : ids.shape[1]]
        merged = torch.cat([norm(ahead, weights[f"{a}.enorm.weight"]), norm(h, weights[f"{a}.hnorm.weight"])], -1)
        x = merged @ weights[f"{a}.eh_proj.weight"].T
        x = x + attention(weights, f"{a}.mixer", norm(x, weights[f"{a}.norm.weight"]), config)
        x = x + moe(weights, f"{e}.mixer", norm(x, weights[f"{e}.norm.weight"]), config)
        h = norm(x, weights[f"{e}.final_layernorm.weight"])
        logits.append(h @ weights["lm_head.weight"].T)
    return logits


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("physical", [1, 2])
@pytest.mark.parametrize("depths", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_logits(attn, physical, depths, length, make_model):
    model = make_model("ME*", exact=True, attn=attn, **{**ONE_DEPTH, "num_nextn_predict_layers": physical})
    ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(0))
    found = model(ids, output_mtp_logits=True, mtp_num_depths=depths, use_cache=False).mtp_logits
    assert len(found) == depths
    for a, b in zip(found, written_out(model, ids, depths), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("pattern", ["*", "E", "-*", "*E-"])
def test_other_layers_in_a_depth(pattern, make_model):
    """One layer both merges and ends; several share one merge and one end."""
    model = make_model("M*", exact=True, **{**ONE_DEPTH, "mtp_hybrid_override_pattern": pattern})
    layers = model.mtp.layers
    assert [hasattr(layer, "eh_proj") for layer in layers] == [True] + [False] * (len(pattern) - 1)
    assert [hasattr(layer, "final_layernorm") for layer in layers] == [False] * (len(pattern) - 1) + [True]
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    first, second = model(ids, output_mtp_logits=True, use_cache=False).mtp_logits
    # Position t of depth k knows tokens up to t + k.
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 61
    changed = model(other, output_mtp_logits=True, use_cache=False).mtp_logits
    for depth, (a, b) in enumerate(zip((first, second), changed, strict=True), start=1):
        torch.testing.assert_close(a[:, : 6 - depth], b[:, : 6 - depth], **TIGHT)
        assert not torch.allclose(a[:, 6 - depth], b[:, 6 - depth])


def cross_entropies(logits, labels, steps):
    """Sum and number of cross entropies of position t against the label `steps` ahead, counted one by one."""
    terms = [
        F.cross_entropy(logits[b, t], labels[b, t + steps])
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - steps)
        if labels[b, t + steps] != -100
    ]
    return sum(terms), len(terms)


@pytest.fixture
def case(make_model):
    model = make_model("ME*", exact=True, **ONE_DEPTH).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (2, 11), generator=generator)
    return model, ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)


@pytest.mark.parametrize("depths", [None, 1, 3])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_loss(depths, scale, case):
    model, ids, labels = case
    model.config.mtp_loss_scaling_factor = scale
    out = model(ids, labels=labels, mtp_num_depths=depths, use_cache=False)
    logits = model.eval()(ids, use_cache=False).logits
    total, count = cross_entropies(logits, labels, 1)
    torch.testing.assert_close(out.lm_loss, total / count, **TIGHT)
    terms = [cross_entropies(b, labels, k + 2) for k, b in enumerate(written_out(model, ids, depths or 2))]
    expected = sum(total / count for total, count in terms) / len(terms)
    torch.testing.assert_close(out.mtp_loss, expected, **TIGHT)
    torch.testing.assert_close(out.loss, out.lm_loss + scale * out.mtp_loss, **TIGHT)
    assert out.mtp_logits is None, "logits of every depth are large: only on request"


def test_the_default_weight_of_the_loss_is_the_release_one(case):
    assert case[0].config.mtp_loss_scaling_factor == 0.3
    assert case[0].config.mtp_num_depths == 2


def test_gradients_reach_backbone_and_mtp(case):
    model, ids, labels = case
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(model(ids, labels=labels, use_cache=False).loss, parameters)
    model.eval()
    total, count = cross_entropies(model(ids, use_cache=False).logits, labels, 1)
    terms = [cross_entropies(b, labels, k + 2) for k, b in enumerate(written_out(model, ids, 2))]
    loss = total / count + 0.3 * sum(t / n for t, n in terms) / 2
    for name, a, b in zip(names, found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_one_normaliser_for_gradient_accumulation(case):
    """Two halves with the whole batch's count add up to the whole batch, MTP included."""
    model, ids, labels = case
    items = int((labels != -100).sum())
    whole = model(ids, labels=labels, num_items_in_batch=items, use_cache=False)
    halves = [
        model(ids[r : r + 1], labels=labels[r : r + 1], num_items_in_batch=torch.tensor(items), use_cache=False)
        for r in range(2)
    ]
    for name in ("loss", "lm_loss", "mtp_loss"):
        torch.testing.assert_close(sum(half[name] for half in halves), whole[name], **TIGHT)
    total, _ = cross_entropies(model(ids, use_cache=False).logits, labels, 1)
    torch.testing.assert_close(whole.lm_loss, total / items, **TIGHT)


def test_in_eval_mode_the_loss_is_plain(case):
    model, ids, labels = case
    out = model.eval()(ids, labels=labels, use_cache=False)
    total, count = cross_entropies(out.logits, labels, 1)
    torch.testing.assert_close(out.loss, total / count, **TIGHT)
    assert out.mtp_loss is None and out.mtp_logits is None
    asked = model(ids, labels=labels, output_mtp_logits=True, use_cache=False)
    assert asked.mtp_loss is not None and len(asked.mtp_logits) == 2
    torch.testing.assert_close(asked.loss, asked.lm_loss + 0.3 * asked.mtp_loss, **TIGHT)


def test_a_model_without_mtp_trains_on_the_plain_loss(make_model):
    model = make_model("ME*", exact=True).train()
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))
    out = model(ids, labels=ids, use_cache=False)
    total, count = cross_entropies(model(ids, use_cache=False).logits, ids, 1)
    torch.testing.assert_close(out.loss, total / count, **TIGHT)
    assert model.mtp is None and out.mtp_loss is None


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("length", [1, 2])
def test_sequences_too_short_for_a_target(length, items, make_model):
    """An empty sum is zero, not NaN, so that one short sequence does not end a training run."""
    model = make_model("ME*", exact=True, **ONE_DEPTH).train()
    ids = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(0))
    out = model(ids, labels=ids, num_items_in_batch=items, use_cache=False)
    out.loss.backward()
    assert out.loss.isfinite() and out.mtp_loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_logits_to_keep_applies_to_mtp_as_well(case):
    model, ids, _ = case
    model.eval()
    every = model(ids, output_mtp_logits=True, use_cache=False)
    last = model(ids, output_mtp_logits=True, logits_to_keep=3, use_cache=False)
    for a, b in zip(every.mtp_logits, last.mtp_logits, strict=True):
        assert torch.equal(a[:, -3:], b)
