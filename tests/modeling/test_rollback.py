"""Taking tokens back: after `crop` the cache is the one that never saw them, whatever the calls and rows."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.modeling import cache as cache_module
from nemotron_super.modeling import mamba2
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.fp8_cache import FP8
from nemotron_super.modeling.static_cache import StaticHybridCache

pytestmark = pytest.mark.usefixtures("exact_floats")

TIGHT = 1e-9
PATTERNS = ["ME*M-", "M-M", "*-"]


def tokens(rows, count, seed=0):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, cache=cache, use_cache=True).logits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    prompt=st.integers(1, 12),
    steps=st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 6)), max_size=4),
    limit=st.sampled_from([6, 64]),
    data=st.data(),
)
def test_crop_leaves_no_trace(pattern, prompt, steps, limit, data, make_model, relative):
    """Drafts of several calls, taken back in part, again and again; and the recorded past may be shorter than all."""
    with mock.patch.object(mamba2, "ROLLBACK_LIMIT", limit):
        check_crop(make_model(pattern, exact=True), prompt, steps, limit, data, relative)


def check_crop(model, prompt, steps, limit, data, relative):
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    kept = tokens(2, prompt)
    feed(model, cache, kept)
    cache.crop(0)
    for number, (calls, back) in enumerate(steps):
        draft = tokens(2, sum(calls), seed=number + 1)
        logits = torch.cat([feed(model, cache, part) for part in draft.split(calls, dim=1)], dim=1)
        with torch.no_grad():
            expected = model(torch.cat([kept, draft], 1), use_cache=False).logits[:, -draft.shape[1] :]
        assert relative(logits, expected) < TIGHT
        back = min(back, draft.shape[1], limit)
        cache.crop(-back)
        kept = torch.cat([kept, draft[:, : draft.shape[1] - back]], 1)
        assert cache.get_seq_length() == kept.shape[1]
    if data.draw(st.booleans()):
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
    last = tokens(2, data.draw(st.integers(1, 3)), seed=99)
    found = feed(model, cache, last)
    with torch.no_grad():
        expected = model(torch.cat([kept, last], 1), use_cache=False).logits[:, -last.shape[1] :]
    assert relative(found, expected) < TIGHT


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    backs=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4),
    left=st.integers(0, 5),
)
def test_rows_take_back_different_numbers(pattern, backs, left, make_model, relative):
    """Behind left padding too: the padded prompt is not recorded, what follows is."""
    model = make_model(pattern, exact=True)
    prompt, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :left] = 0
    rows = [prompt[r, mask[r].bool()] for r in range(3)]
    cache = HybridCache(model.config)
    feed(model, cache, prompt, mask)
    cache.activate_past_recording()
    for number, back in enumerate(backs):
        draft = tokens(3, 4, seed=number + 1)
        mask = torch.cat([mask, torch.ones_like(draft)], 1)
        logits = feed(model, cache, draft, mask)
        for r in range(3):
            with torch.no_grad():
                expected = model(torch.cat([rows[r], draft[r]])[None], use_cache=False).logits[0, -4:]
            assert relative(logits[r], expected) < TIGHT
            rows[r] = torch.cat([rows[r], draft[r, : 4 - back[r]]])
        taken = torch.tensor(back)
        cache.crop(-taken)
        mask = mask[:, : mask.shape[1] - min(back)]
        # What a row gave back beyond the others stays behind as masked keys.
        mask = mask * (torch.arange(mask.shape[1]) < (mask.shape[1] - (taken - min(back)))[:, None])


def offload_and_prefetch(layers):
    """There and back by copies, since both devices are the CPU; what was left behind is spoilt."""
    before = [tensors_of(layer) for layer in layers]
    assert all(len(tensors) == 3 for tensors in before)  # both states, and what is pending
    for device, move in (("cpu", "offload"), (layers[0].device, "prefetch")):
        asked: list = []

        def to(tensor, where, asked=asked, **kwargs):
            asked.append(where)
            copy = tensor.clone()
            tensor.fill_(torch.nan)
            return copy

        with mock.patch.object(torch.Tensor, "to", to):
            for layer in layers:
                getattr(layer, move)()
        assert asked == [device] * 3 * len(layers)


def tensors_of(part):
    """Every tensor that an object holds, in attributes, dictionaries and lists too."""
    if torch.is_tensor(part):
        return [part]
    if isinstance(part, dict):
        part = list(part.values())
    elif hasattr(part, "__dict__") and type(part).__module__.startswith(("nemotron_super.", "transformers.cache")):
        part = list(vars(part).values())
    return [tensor for inner in part for tensor in tensors_of(inner)] if isinstance(part, list) else []


@pytest.mark.parametrize("kind", ["growing", "fp8", "static", "static fp8", "offloading"])
def test_to_another_device(kind, make_model):
    """Nothing of it stays behind."""
    model = make_model("ME*M", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    kv_dtype = FP8 if "fp8" in kind else None
    if "static" in kind:
        cache = StaticHybridCache(model.config, 40, kv_dtype=kv_dtype)
        model.generate(tokens(2, 5), cache=cache, use_mtp=True, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    else:
        cache = HybridCache(model.config, kv_dtype=kv_dtype)
        feed(model, cache, tokens(2, 5))
        cache.activate_past_recording()
        feed(model, cache, tokens(2, 4))
        cache.crop(torch.tensor([-1, -2]))
        assert cache.layers[0].pending_lengths is not None
    held, length = len(tensors_of(cache.layers)), cache.get_seq_length()
    cache.offloading = kind == "offloading"
    assert cache.to("meta") is cache and cache.get_seq_length() == length
    assert len(tensors_of(cache.layers)) == held - (2 if "static" in kind else 0)  # where slots lie is made anew
    stayed = [t for t in tensors_of(cache) if t.device.type != "meta" and t.numel()]
    assert len(stayed) == (2 if cache.offloading else 0)  # keys and values, until they are fetched
    cache.layers[2].prefetch()
    assert cache.layers[2].keys.device.type == "meta"


@pytest.mark.parametrize("change", ["copy", "select", "repeat", "reorder", "offload"])
def test_a_recorded_past_follows_its_rows(change, make_model, relative):
    model = make_model("ME*M", exact=True)
    cache = HybridCache(model.config)
    first, draft, last = tokens(3, 5), tokens(3, 4, 1), tokens(3, 2, 2)
    feed(model, cache, first)
    cache.activate_past_recording()
    feed(model, cache, draft)
    rows = torch.arange(3)
    if change == "copy":
        cache = copy.deepcopy(cache)
    elif change == "select":
        rows = torch.tensor([2, 0])
        cache.batch_select_indices(rows)
    elif change == "repeat":
        rows = torch.arange(3).repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    elif change == "reorder":
        rows = torch.tensor([1, 1, 0])
        cache.reorder_cache(rows)
    else:
        offload_and_prefetch([layer for layer in cache.layers if isinstance(layer, cache_module.Mamba2CacheLayer)])
    cache.crop(-3)
    found = feed(model, cache, last[rows])
    with torch.no_grad():
        expected = model(torch.cat([first, draft[:, :1], last], 1)[rows], use_cache=False).logits[:, -2:]
    assert relative(found, expected) < TIGHT


def test_reset_forgets_the_recorded_past(make_model, relative):
    model = make_model("ME*M", exact=True)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, tokens(2, 5))
    cache.reset()
    ids = tokens(2, 4, 1)
    with torch.no_grad():
        assert relative(feed(model, cache, ids), model(ids, use_cache=False).logits) < TIGHT


def test_what_cannot_be_taken_back(make_model):
    model = make_model("M*")
    cache = HybridCache(model.config)
    feed(model, cache, tokens(1, 5))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    feed(model, cache, tokens(1, 3))
    with pytest.raises(RuntimeError, match=r"4 tokens.*last 3"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(2)
    cache.crop(torch.tensor([-1]))
    cache.crop(0)
    with pytest.raises(RuntimeError, match="rows of different lengths"):
        cache.crop(-1)


def test_it_costs_little(make_model):
    """A recorded token holds its inputs, not a state."""
    model = make_model("MM", mamba_head_dim=64, ssm_state_size=64)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, tokens(1, 200))
    layer = cache.layers[0]
    assert layer.pending.shape[1] == cache_module.ROLLBACK_LIMIT
    assert layer.pending[:, :1].numel() < layer.recurrent_states[0].numel() / 10


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    first=st.integers(0, 5),
    length=st.integers(1, 7),
    padded=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    back=st.integers(0, 7),
)
def test_a_recorded_call_with_padding(pattern, first, length, padded, back, make_model, relative):
    """Padding may stand anywhere before the positions taken back, behind tokens that are recorded as well."""
    model = make_model(pattern, exact=True)
    before, call, last = tokens(2, first), tokens(2, length, 1), tokens(2, 3, 2)
    mask = torch.ones(2, first + length, dtype=torch.long)
    for row, place in enumerate(padded):
        if place < length - 1:
            mask[row, first + place] = 0
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    if first:
        feed(model, cache, before)
    logits = feed(model, cache, call, mask)
    free = int(mask.flip(1).cumprod(1).sum(1).min())
    back = min(back, free if int(mask.min()) == 0 else first + length)
    cache.crop(-back)
    kept = torch.cat([before, call], 1)[:, : first + length - back]
    mask = mask[:, : first + length - back]
    found = feed(model, cache, last, torch.cat([mask, torch.ones_like(last)], 1))
    for row in range(2):
        alone = torch.cat([kept[row, mask[row].bool()], last[row]])[None]
        with torch.no_grad():
            assert relative(found[row], model(alone, use_cache=False).logits[0, -3:]) < TIGHT
    assert logits.shape[1] == length
