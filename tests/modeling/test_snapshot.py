"""One long prompt, read once: continued many times, in batches, and in another process."""

import copy

import pytest
import torch
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


FIELDS = {"configuration": {"n_groups": 1}, "SSM dtype": {"mamba_ssm_cache_dtype": "bfloat16"}}


@pytest.mark.parametrize("change", ["configuration", "SSM dtype", "dtype", "weights", "router bias"])
def test_a_snapshot_of_another_model(change, make_model, tmp_path):
    model = make_model("ME*M-")
    save_snapshot(prefilled(model, prompt(9)), tmp_path / "a.safetensors", model)
    other = make_model("ME*M-", seed=int(change == "weights"), **FIELDS.get(change, {}))
    if change == "dtype":
        other = other.bfloat16()
    elif change == "router bias":  # a buffer, which a balanced training run moves
        other.model.layers[1].mixer.gate.e_score_correction_bias += 0.001
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


DAMAGE = {
    "missing": (lambda t: t.pop("layers.2.values"), r"missing or surplus \(layers\.2\.values\)"),
    "surplus": (lambda t: t.update({"layers.9.keys": torch.zeros(1)}), r"missing or surplus \(layers\.9\.keys\)"),
    "another shape": (
        lambda t: t.update({"layers.0.ssm_state": t["layers.0.ssm_state"][:, :1].contiguous()}),
        r"shape \(1, 8, 8\) for layer 0",
    ),
    "another batch": (
        lambda t: t.update({"layers.3.conv_state": t["layers.3.conv_state"].repeat(2, 1, 1)}),
        "batch of 2 but this call has 1",
    ),
    "cut short": (None, "no whole safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_snapshot(case, make_model, tmp_path):
    """The fingerprint fits, the content does not."""
    model, file = make_model("ME*M-"), tmp_path / "a.safetensors"
    save_snapshot(prefilled(model, prompt(9)), file, model)
    change, message = DAMAGE[case]
    if change is None:
        file.write_bytes(file.read_bytes()[:-100])
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=message):
        load_snapshot(file, model)


def test_the_dtypes_of_the_states_stay(make_model, tmp_path):
    """Read back bit for bit, also where the SSM state is coarser than the model."""
    model = make_model("M*", mamba_ssm_cache_dtype="float16")
    cache = prefilled(model, prompt(9))
    save_snapshot(cache, tmp_path / "a.safetensors", model)
    again = load_snapshot(tmp_path / "a.safetensors", model)
    assert again.layers[0].recurrent_states[0].dtype == torch.float16
    assert again.layers[0].recurrent_states[0].equal(cache.layers[0].recurrent_states[0])
    assert again.layers[1].values.equal(cache.layers[1].values)
