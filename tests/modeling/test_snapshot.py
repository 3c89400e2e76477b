"""One long prompt, read once: continued many times, in batches, and in another process."""

import copy
import subprocess
import sys

import pytest
import torch
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot, snapshot_mask
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


@pytest.mark.parametrize("use_mtp", [False, True])
def test_a_padded_batch(use_mtp, model, tmp_path):
    """Its mask is saved with it, and asked for."""
    file = tmp_path / "a.safetensors"
    ids, mask = torch.cat([prompt(9, 1), prompt(9, 2)]), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"holds padding.*attention_mask"):
        save_snapshot(cache, file, model)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), but `cache` holds \(2, 9\)"):
        save_snapshot(cache, file, model, mask[:, 1:])
    save_snapshot(cache, file, model, mask)
    cache = load_snapshot(file, model)
    with pytest.raises(ValueError, match="holds padding"):
        save_snapshot(cache, file, model)
    read = snapshot_mask(file)
    assert read is not None and read.equal(mask)
    turn, more = torch.cat([ids, prompt(3, 3).expand(2, -1)], 1), torch.ones(2, 3, dtype=torch.long)
    whole = torch.cat([mask, more], 1)
    found = model.generate(turn, cache=cache, attention_mask=torch.cat([read, more], 1), use_mtp=use_mtp, **GREEDY)
    assert found.equal(model.generate(turn, attention_mask=whole, **GREEDY))
    save_snapshot(prefilled(model, prompt(9)), file, model)
    assert snapshot_mask(file) is None


CONTINUE = """
import sys, torch
from nemotron_super import NemotronHForCausalLM
from nemotron_super.modeling.snapshot import load_snapshot
folder, ids = sys.argv[1], torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
model = NemotronHForCausalLM.from_pretrained(folder)
cache = load_snapshot(folder + "/prompt.safetensors", model)
assert cache.get_seq_length() == 40
print(model.generate(ids, cache=cache, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
"""


def test_continued_in_another_process(make_model, tmp_path):
    model, ids = make_model("ME*M-"), prompt(40)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    save_snapshot(prefilled(model, ids), tmp_path / "prompt.safetensors", model)
    turn = torch.cat([ids, prompt(5, 1)], 1)
    text = ",".join(map(str, turn[0].tolist()))
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, tmp_path, text], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(model.generate(turn, **GREEDY).tolist())


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
