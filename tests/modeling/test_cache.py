"""The cache changes nothing: any way of cutting a sequence into calls gives what one call gives."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super import HybridCache
from nemotron_super.modeling import mamba2, token_layout
from nemotron_super.modeling.cache import Mamba2CacheLayer
from nemotron_super.modeling.static_cache import StaticHybridCache
from transformers import DynamicCache

pytestmark = pytest.mark.usefixtures("exact_floats")

TIGHT = 1e-9
# A hybrid, Mamba-2 only, attention before Mamba-2, and no Mamba-2 at all.
PATTERNS = ["ME*M-", "M-M", "*EM", "*-*"]


def in_calls(model, ids, cuts, mask=None, cache=None):
    """Logits of all positions, computed call by call; `mask` grows along."""
    logits, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        here = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=here, cache=cache, use_cache=True)
        logits.append(out.logits)
        cache, start = out.cache, end
    return torch.cat(logits, 1), cache


@st.composite
def lengths_and_cuts(draw):
    length = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 26]))
    style = draw(st.sampled_from(["any", "any", "every token"]))
    cuts = range(1, length) if style == "every token" else sorted(draw(st.sets(st.integers(1, max(1, length - 1)))))
    return length, [c for c in cuts if c < length]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    sizes=lengths_and_cuts(),
    batch=st.integers(1, 3),
    padding=st.sampled_from(["none", "left", "right", "any"]),
    attn=st.sampled_from(["eager", "sdpa"]),
    segment=st.sampled_from([8, 512]),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_any_split_equals_one_call(pattern, sizes, batch, padding, attn, segment, seed, make_model, relative):
    model = make_model(pattern, exact=True, attn=attn)
    length, cuts = sizes
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (batch, length), generator=generator)
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = {
        "none": None,
        "left": torch.arange(length) >= length - real,
        "right": torch.arange(length) < real,
        "any": torch.rand(batch, length, generator=generator) < 0.7,
    }[padding]
    expected = model(ids, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
    with mock.patch.dict(mamba2._SEGMENT_TOKENS, {"cpu": segment}):
        logits, cache = in_calls(model, ids, cuts, None if mask is None else mask.long())
    assert cache.get_seq_length() == length
    where = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    if where.any():
        assert relative(logits[where], expected[where]) < TIGHT


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=lengths_and_cuts(), padding=st.sampled_from(["left", "right"]), seed=st.integers(0, 2**16))
@torch.no_grad()
def test_padded_rows_in_calls_equal_rows_alone(sizes, padding, seed, make_model, relative):
    model = make_model(exact=True)
    length, cuts = sizes
    ids = torch.randint(0, 61, (3, length), generator=torch.Generator().manual_seed(seed))
    real = torch.tensor([[length], [(length + 1) // 2], [1]])
    mask = torch.arange(length) >= length - real if padding == "left" else torch.arange(length) < real
    logits, _ = in_calls(model, ids, cuts, mask.long())
    for row in range(3):
        alone = model(ids[row, mask[row]][None], use_cache=False).logits[0]
        assert relative(logits[row, mask[row]], alone) < TIGHT


@torch.no_grad()
def test_prompt_of_several_lengths_then_more_text(make_model, relative):
    """Right-padded prompts, continued: what was padding stays out for good."""
    model = make_model(exact=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 61, (n,), generator=generator) for n in (3, 11, 6)]
    more = torch.randint(0, 61, (3, 5), generator=generator)
    ids, mask = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    ids[:, 11:], mask[:, 11:] = more, 1
    for cuts in ([11], [11, 12, 13, 14, 15], [11, 13], [2, 4, 11, 12]):
        logits, _ = in_calls(model, ids, cuts, mask)
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, more[row]])[None], use_cache=False).logits[0]
            assert relative(logits[row, 11:], alone[len(prompt) :]) < TIGHT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_a_coarser_state_costs_little(dtype, make_model, relative):
    model = make_model(mamba_ssm_cache_dtype=dtype, scale=2.0)
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    logits, cache = in_calls(model, ids, range(1, 20))
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert {state.dtype for state in states} == {getattr(torch, dtype)}
    assert relative(logits, model(ids, use_cache=False).logits) < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_a_coarser_state_is_rounded_at_random(dtype, make_model):
    """Behind a prompt and behind every token; the same seed gives the same text, float32 needs none."""
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))

    def states(model, seed, cuts):
        torch.manual_seed(seed)
        cache = in_calls(model, ids, cuts)[1]
        return torch.stack([layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")])

    coarse, exact = make_model("MEM", mamba_ssm_cache_dtype=dtype), make_model("MEM")
    for cuts in ((), range(6, 12)):
        assert states(coarse, 0, cuts).equal(states(coarse, 0, cuts))
        assert not states(coarse, 0, cuts).equal(states(coarse, 1, cuts))
        assert states(exact, 0, cuts).equal(states(exact, 1, cuts))


@torch.no_grad()
def test_time_steps_far_below_time_step_min(make_model, relative):
    """`time_step_min` is for initialisation: neither prefill nor decoding may clamp to it."""
    model = make_model("MM", exact=True)
    for layer in model.model.layers:
        layer.mixer.dt_bias.fill_(-9.0)
        layer.mixer.in_proj.weight[-4:] = 0.0
        layer.mixer.D.zero_()
    ids = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    assert relative(in_calls(model, ids, range(1, 19))[0], whole) < TIGHT
    for layer in model.model.layers:
        layer.mixer.time_step_limit = (model.config.time_step_min, float("inf"))
    assert relative(model(ids, use_cache=False).logits, whole) > 0.01, "the test would not see a clamp"


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_selecting_repeating_and_reordering_rows(pattern, make_model, relative):
    model = make_model(pattern, exact=True)
    ids = torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits

    def continued(change, rows):
        cache = HybridCache(model.config)
        model(ids[:, :9], cache=cache, use_cache=True)
        change(cache)
        for cuts in ((), range(1, 5)):
            copy = HybridCache(model.config)
            model(ids[:, :9], cache=copy, use_cache=True)
            change(copy)
            logits, _ = in_calls(model, ids[rows][:, 9:], cuts, cache=copy)
            assert relative(logits, whole[rows][:, 9:]) < TIGHT

    continued(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
    continued(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    continued(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0])


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_reset(pattern, make_model):
    model = make_model(pattern, exact=True)
    first, second = torch.randint(0, 61, (2, 2, 10), generator=torch.Generator().manual_seed(0))
    expected, cache = in_calls(model, first, [4, 5])
    cache.reset()
    assert cache.get_seq_length() == 0
    in_calls(model, second, [7], cache=cache)
    cache.reset()
    for cuts in ([4, 5], range(1, 10)):
        again, _ = in_calls(model, first, cuts, cache=cache)
        torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)
        cache.reset()


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_transformers_cache_works(pattern, make_model, relative):
    model = make_model(pattern, exact=True)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    if "*" not in pattern:
        # transformers' cache has no length without attention layers; ours has, and `use_cache` makes ours.
        with pytest.raises(ValueError, match="only contain LinearAttention layers"):
            model(ids, cache=cache)
        return
    logits, _ = in_calls(model, ids, [5, 6, 7], cache=cache)
    assert relative(logits, expected) < TIGHT


def greedy(model, ids, mask, **kwargs):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_and_without_cache(pattern, beams, make_model):
    model = make_model(pattern, exact=True)
    ids = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    found, expected = (greedy(model, ids, mask, num_beams=beams, use_cache=use_cache) for use_cache in (True, False))
    assert found.tolist() == expected.tolist()
    if beams == 1:
        for row in range(3):
            alone = ids[row, mask[row].bool()][None]
            assert greedy(model, alone, torch.ones_like(alone))[0, -12:].tolist() == found[row, -12:].tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate_several_continuations(pattern, make_model):
    """`num_return_sequences` with beams repeats the cache's rows."""
    model = make_model(pattern, exact=True)
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"num_beams": 4, "num_return_sequences": 3}
    found, expected = (greedy(model, ids, mask, use_cache=c, **arguments) for c in (True, False))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("make_cache", [HybridCache, lambda config: DynamicCache(config=config)])
def test_generate_continues_a_given_cache(make_cache, make_model):
    model = make_model(exact=True)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    expected = greedy(model, ids, mask)
    cache = make_cache(model.config)
    with torch.no_grad():
        model(ids[:, :6], cache=cache, use_cache=True)
    assert greedy(model, ids, mask, cache=cache).tolist() == expected.tolist()


def fill(model, batch=2):
    with torch.no_grad():
        return model(torch.zeros(batch, 5, dtype=torch.long), use_cache=True).cache


REFUSED = {
    "layer count": ("ME*M", "ME*ME", {}),
    "heads of the SSM state": ("ME*M", "ME*M", {"mamba_num_heads": 8}),
    "width of the SSM state": ("ME*M", "ME*M", {"ssm_state_size": 4}),
    "SSM state, attention first": ("*M", "*M", {"ssm_state_size": 4}),
    "SSM state, Mamba-2 only": ("MM", "MM", {"mamba_head_dim": 4}),
    "key heads": ("M*", "M*", {"num_key_value_heads": 1}),
    "head size, no Mamba-2": ("*-", "*-", {"head_dim": 4}),
    "convolution width": ("M*", "M*", {"conv_kernel": 3}),
    "number of groups": ("M*", "M*", {"n_groups": 1}),
    "attention where Mamba-2 was": ("M*", "**", {}),
    "Mamba-2 where attention was": ("M*", "MM", {}),
    "kinds in another order": ("M*", "*M", {}),
    "kinds after the first attention layer": ("*M-", "*-M", {}),
    "attention where there is none": ("M*", "M-", {}),
}


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_of_another_configuration_is_refused(case, filled, make_model):
    made_by, used_by, fields = REFUSED[case]
    other, model = make_model(made_by), make_model(used_by, **fields)
    if filled:
        cache = fill(other)
    elif made_by != used_by:
        cache = HybridCache(other.config)
    else:
        return  # an empty cache of the same layers fits
    with pytest.raises(ValueError, match="cache"):
        model(torch.zeros(2, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 3])
def test_a_cache_of_another_batch_size_is_refused(pattern, length, make_model):
    model = make_model(pattern)
    cache = fill(model, batch=2)
    with pytest.raises(ValueError, match=r"cache.*2.*3"):
        model(torch.zeros(3, length, dtype=torch.long), cache=cache)


def test_a_cache_made_without_a_configuration_is_refused(make_model):
    with pytest.raises(ValueError, match="cache"):
        make_model()(torch.zeros(1, 3, dtype=torch.long), cache=DynamicCache(), use_cache=True)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("pieces", [(5, 3, 7), (1, 14), (9, 1, 5)], ids=str)
def test_a_long_prompt_in_pieces_needs_no_mask(kind, pieces, make_model, relative, monkeypatch):
    """What a GPU does in half precision: queries behind cached keys, aligned at the end, without a mask over all keys."""
    monkeypatch.setattr(token_layout, "_MASKLESS_PAST", {("cpu", torch.float64)})
    model = make_model("M*-*", exact=True)
    ids = torch.randint(0, 61, (2, 15), generator=torch.Generator().manual_seed(0))
    cache = HybridCache(model.config) if kind == "growing" else StaticHybridCache(model.config, 40)
    make_mask = token_layout.create_causal_mask

    def only_small(**kwargs):
        assert kwargs["inputs_embeds"].shape[1] == 1 or kwargs["cache"].get_seq_length() == 0
        return make_mask(**kwargs)

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        monkeypatch.setattr(token_layout, "create_causal_mask", only_small)
        found = [model(part, cache=cache).logits for part in ids.split(pieces, dim=1)]
    assert relative(torch.cat(found, dim=1), expected) < TIGHT


@pytest.mark.parametrize("dense", [True, False])
def test_the_first_state_is_kept_itself_and_later_ones_at_its_address(dense):
    layer = Mamba2CacheLayer()
    states = torch.randn(2, 3, 4), torch.randn(2, 5, 3, 4)
    if not dense:  # kernels of one token want states without gaps
        states = tuple(state.mT.contiguous().mT for state in states)
    later = [state + 1 for state in states]
    kept = layer.update_conv_state(states[0]), layer.update_recurrent_state(states[1])
    for found, state in zip(kept, states, strict=True):
        assert found.equal(state) and found.is_contiguous()
        assert (found.data_ptr() == state.data_ptr()) == dense
    layer.update_conv_state(later[0])
    layer.update_recurrent_state(later[1])
    assert layer.conv_states[0] is kept[0] and layer.recurrent_states[0] is kept[1]
    assert kept[0].equal(later[0]) and kept[1].equal(later[1])
