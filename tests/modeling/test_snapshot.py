"""One long prompt, read once: continued many times, in batches, and in another process."""

import copy

import pytest
import torch
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from safetensors.torch import save_file

PATTERNS = ["ME*M-", "M-M", "*-"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def prompt(length, seed=0):
    return torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PATTERNS)
def model(request, make_model):
    return make_model(request.param, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")


def prefilled(model, ids):
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("use_mtp", [False, True])
def test_continued_many_times(model, use_mtp, tmp_path):
    ids = prompt(40)
    save_snapshot(prefilled(model, ids), tmp_path / "prompt.safetensors", model)
    snapshot = load_snapshot(tmp_path / "prompt.safetensors", model)
    for seed in range(3):
        turn = torch.cat([ids, prompt(5, seed + 1)], 1)
        found = model.generate(turn, cache=copy.deepcopy(snapshot), use_mtp=use_mtp, **GREEDY)
        assert found.equal(model.generate(turn, **GREEDY))


def test_continued_as_a_batch(model):
    ids = prompt(40)
    cache = prefilled(model, ids)
    cache.batch_repeat_interleave(3)
    turns = torch.cat([torch.cat([ids, prompt(5, seed)], 1) for seed in range(3)])
    assert model.generate(turns, cache=cache, **GREEDY).equal(model.generate(turns, **GREEDY))


@pytest.mark.parametrize("change", ["configuration", "dtype", "weights"])
def test_a_snapshot_of_another_model(change, make_model, tmp_path):
    model = make_model("ME*M-")
    save_snapshot(prefilled(model, prompt(9)), tmp_path / "a.safetensors", model)
    other = make_model("ME*M-", seed=int(change == "weights"), **{"n_groups": 1} if change == "configuration" else {})
    if change == "dtype":
        other = other.bfloat16()
    with pytest.raises(ValueError, match="another model"):
        load_snapshot(tmp_path / "a.safetensors", other)
    assert load_snapshot(tmp_path / "a.safetensors", make_model("ME*M-")).get_seq_length() == 9


def test_what_is_no_snapshot(make_model, tmp_path):
    model = make_model("ME*M-")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no snapshot"):
        load_snapshot(tmp_path / "a.safetensors", model)
    with pytest.raises(ValueError, match="empty"):
        save_snapshot(HybridCache(model.config), tmp_path / "b.safetensors", model)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(3), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="taken back"):
        save_snapshot(cache, tmp_path / "b.safetensors", model)
    assert not (tmp_path / "b.safetensors").exists()
