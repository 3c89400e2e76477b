"""Damaged, incomplete and ill-fitting checkpoints are refused by the name of the tensor or file that is wrong."""

import json
import logging
import os
import pickle
import re

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, NemotronHForTokenClassification, NemotronHModel
from nemotron_super.modeling.weight_checks import published_name
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

LOADERS = [NemotronHForCausalLM, NemotronHModel, AutoModelForCausalLM, AutoModel]
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"
MTP_EXPERT = "mtp.layers.1.mixer.experts.0.down_proj.weight"


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def reshaped(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.bfloat16)})


def message(caught) -> str:
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_missing_expert(load, files, rewrite):
    folder = rewrite(without(EXPERT), files)
    with pytest.raises(ValueError) as caught:
        load.from_pretrained(folder)
    assert EXPERT in message(caught) and "`n_routed_experts`" in message(caught)
    assert "experts.2." not in message(caught) and "down_proj" not in message(caught)


def test_missing_expert_of_mtp(rewrite):
    with pytest.raises(ValueError, match=re.escape(MTP_EXPERT)):
        NemotronHForCausalLM.from_pretrained(rewrite(without(MTP_EXPERT)))
    # The backbone alone does not need it.
    NemotronHModel.from_pretrained(rewrite(without(MTP_EXPERT)))


def test_every_missing_expert_is_listed_up_to_a_limit(rewrite):
    names = [EXPERT.replace("3", str(e)) for e in (0, 4, 5)]
    with pytest.raises(ValueError) as caught:
        NemotronHForCausalLM.from_pretrained(rewrite(without(*names)))
    assert all(name in message(caught) for name in names)
    many = [f"backbone.layers.{i}.mixer.experts.{e}.{p}_proj.weight"
            for i in (1, 5) for e in range(1, 5) for p in ("up", "down")]  # fmt: skip
    with pytest.raises(ValueError, match=r"and 4 more"):
        NemotronHForCausalLM.from_pretrained(rewrite(without(*many)))


def test_a_gap_with_the_right_count(rewrite):
    """Expert 3 is lost and a seventh is there: stacked by count alone, experts 3 to 5 would get another's weights."""

    def shift(tensors):
        tensors[EXPERT.replace("3", "6")] = tensors.pop(EXPERT)

    with pytest.raises(ValueError) as caught:
        NemotronHForCausalLM.from_pretrained(rewrite(shift))
    assert EXPERT in message(caught)


def test_missing_expert_when_sizes_may_differ(rewrite, caplog):
    """Then it is said, and the layer's experts start afresh; the rest is loaded."""
    folder = rewrite(without(EXPERT))
    model, info = NemotronHForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert EXPERT in caplog.text
    assert {name for name, *_ in info["mismatched_keys"]} == {"model.layers.1.mixer.experts.up_proj"}
    tensors = load_file(folder / "model.safetensors")
    down = model.model.layers[1].mixer.experts.down_proj
    assert all(down[e].equal(tensors[f"backbone.layers.1.mixer.experts.{e}.down_proj.weight"]) for e in range(6))


def test_missing_expert_through_a_key_mapping(rewrite):
    """The published name is said, whatever the file calls its tensors."""

    def rename(tensors):
        del tensors[EXPERT]
        for name in list(tensors):
            tensors[name.replace("backbone.", "trunk.")] = tensors.pop(name)

    with pytest.raises(ValueError, match=re.escape(EXPERT)):
        NemotronHForCausalLM.from_pretrained(rewrite(rename), key_mapping={r"^trunk\.": "backbone."})


def test_surplus_experts(rewrite):
    folder = rewrite(n_routed_experts=4)
    with pytest.raises(ValueError) as caught:
        NemotronHForCausalLM.from_pretrained(folder)
    assert "`n_routed_experts` (4)" in message(caught)
    assert "backbone.layers.1.mixer.experts.4.up_proj.weight" in message(caught)
    assert "experts.3." not in message(caught)


def test_too_many_experts_in_the_configuration(rewrite):
    with pytest.raises(ValueError) as caught:
        NemotronHForCausalLM.from_pretrained(rewrite(n_routed_experts=8))
    assert "experts.6.up_proj" in message(caught) and "`n_routed_experts` too high" in message(caught)


# A field changed in the configuration -> a tensor that no longer fits, its shape, the wanted one, fields to look at.
DISAGREEMENTS = [
    ({"vocab_size": 67}, "backbone.embeddings.weight", (61, 24), (67, 24), "vocab_size"),
    ({"vocab_size": 67}, "lm_head.weight", (61, 24), (67, 24), "vocab_size"),
    ({"hidden_size": 32}, "backbone.layers.0.norm.weight", (24,), (32,), "hidden_size"),
    ({"mamba_num_heads": 8}, "backbone.layers.0.mixer.A_log", (4,), (8,), "mamba_num_heads"),
    ({"mamba_num_heads": 8}, "backbone.layers.0.mixer.norm.weight", (32,), (64,), "mamba_num_heads, mamba_head_dim"),
    ({"mamba_head_dim": 4}, "backbone.layers.0.mixer.out_proj.weight", (24, 32), (24, 16), "mamba_head_dim"),
    ({"ssm_state_size": 16}, "backbone.layers.0.mixer.in_proj.weight", (100, 24), (132, 24), "ssm_state_size"),
    ({"n_groups": 4}, "backbone.layers.0.mixer.conv1d.bias", (64,), (96,), "n_groups"),
    ({"conv_kernel": 3}, "backbone.layers.0.mixer.conv1d.weight", (64, 1, 4), (64, 1, 3), "conv_kernel"),
    ({"num_attention_heads": 2}, "backbone.layers.2.mixer.q_proj.weight", (32, 24), (16, 24), "num_attention_heads"),
    ({"num_key_value_heads": 4}, "backbone.layers.2.mixer.k_proj.weight", (16, 24), (32, 24), "num_key_value_heads"),
    ({"intermediate_size": 28}, "backbone.layers.3.mixer.up_proj.weight", (20, 24), (28, 24), "intermediate_size"),
    ({"moe_latent_size": 6}, "backbone.layers.1.mixer.fc1_latent_proj.weight", (12, 24), (6, 24), "moe_latent_size"),
    ({"moe_latent_size": None}, EXPERT, (10, 12), (10, 24), "moe_latent_size"),
    ({"moe_intermediate_size": 12}, EXPERT, (10, 12), (12, 12), "moe_intermediate_size"),
    (
        {"moe_shared_expert_intermediate_size": 8},
        "backbone.layers.1.mixer.shared_experts.down_proj.weight",
        (24, 16),
        (24, 8),
        "moe_shared_expert_intermediate_size",
    ),
]


@pytest.mark.parametrize("fields, tensor, held, wanted, look_at", DISAGREEMENTS, ids=lambda v: str(v)[:50])
def test_configuration_disagrees(fields, tensor, held, wanted, look_at, rewrite, monkeypatch):
    monkeypatch.setattr("nemotron_super.modeling.weight_checks._NAMES_IN_A_MESSAGE", 999)
    with pytest.raises(ValueError) as caught:
        NemotronHForCausalLM.from_pretrained(rewrite(**fields))
    found = re.search(
        re.escape(f"{tensor} has shape {held}, the configuration wants {wanted}") + r" \(see ([^;]*)\)",
        message(caught),
    )
    assert found, message(caught)
    assert look_at in found[1] and "ignore_mismatched_sizes" in message(caught)


@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_one_misshapen_tensor(load, rewrite):
    folder = rewrite(reshaped("backbone.layers.2.mixer.o_proj.weight", 24, 7))
    with pytest.raises(ValueError) as caught:
        load.from_pretrained(folder)
    assert "backbone.layers.2.mixer.o_proj.weight has shape (24, 7), the configuration wants (24, 32)" in message(
        caught
    )
    assert message(caught).count("has shape") == 1


def test_one_misshapen_expert(rewrite):
    with pytest.raises(ValueError, match=re.escape(f"{EXPERT} has shape (2, 2), the configuration wants (10, 12)")):
        NemotronHForCausalLM.from_pretrained(rewrite(reshaped(EXPERT, 2, 2)))


def test_mismatch_on_request(rewrite):
    """`ignore_mismatched_sizes` starts only the misshapen tensor afresh."""
    folder = rewrite(reshaped("backbone.layers.2.mixer.o_proj.weight", 24, 7))
    model, info = NemotronHForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"] == {
        ("model.layers.2.mixer.o_proj.weight", torch.Size([24, 7]), torch.Size([24, 32]))
    }
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        published = re.sub(r"^model\.", "backbone.", name)
        if published in tensors and "o_proj" not in name:
            assert tensor.equal(tensors[published]), name
    assert model.model.layers[2].mixer.o_proj.weight.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_not_finite(load, value, rewrite):
    names = [
        "backbone.embeddings.weight",
        "backbone.layers.0.mixer.dt_bias",
        EXPERT,
        EXPERT.replace("3", "5"),
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
    ]

    def spoil(tensors):
        for name in names:
            tensors[name].view(-1)[-1] = value

    with pytest.raises(ValueError, match="NaN or infinity") as caught:
        load.from_pretrained(rewrite(spoil))
    listed = re.findall(r"[\w.]*backbone\.[\w.]+\w", message(caught))
    assert sorted(listed) == sorted(names)


def test_not_finite_in_mtp(rewrite):
    def spoil(tensors):
        tensors[MTP_EXPERT][0, 0] = float("nan")

    folder = rewrite(spoil, files=3)
    with pytest.raises(ValueError, match=re.escape(f"infinity in {MTP_EXPERT}. It is damaged")):
        NemotronHForCausalLM.from_pretrained(folder)
    NemotronHModel.from_pretrained(folder)


def test_large_finite_values_pass(rewrite):
    """Their sum overflows float32; each of them is finite."""
    name = "backbone.layers.3.mixer.up_proj.weight"
    model = NemotronHForCausalLM.from_pretrained(
        rewrite(lambda tensors: tensors.update({name: torch.full((20, 24), 3e38, dtype=torch.bfloat16)}))
    )
    assert model.model.layers[3].mixer.up_proj.weight.eq(torch.tensor(3e38, dtype=torch.bfloat16)).all()


def cut(file, size):
    with open(file, "r+b") as opened:
        opened.truncate(size)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("left", [0, 5, 100, -1, -1000])
@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_truncated_file(load, left, files, rewrite):
    folder = rewrite(files=files)
    file = folder / ("model.safetensors" if files == 1 else "model-00002-of-00003.safetensors")
    size = left if left >= 0 else os.path.getsize(file) + left
    cut(file, size)
    with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
        load.from_pretrained(folder)
    assert f"{file} ({size} bytes)" in message(caught) and "00001" not in message(caught)


@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_truncated_file_without_a_dtype_in_the_configuration(load, rewrite):
    """transformers then reads a file before it makes the model."""
    folder = rewrite(dtype=None, torch_dtype=None)
    cut(folder / "model.safetensors", 4000)
    with pytest.raises(ValueError, match=r"model.safetensors \(4000 bytes\) is not a whole safetensors file"):
        load.from_pretrained(folder)


def test_a_file_of_something_else(rewrite):
    folder = rewrite()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n" * 9)
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is not a whole safetensors file"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_missing_shard(rewrite):
    folder = rewrite(files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is not there.*index"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_tensor_that_only_the_index_knows(rewrite, caplog):
    folder = rewrite(files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["backbone.norm_f.weight"]
    tensors = load_file(file)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, file, {"format": "pt"})
    _, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm_f.weight"} and "norm_f.weight" in caplog.text


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
@pytest.mark.parametrize("load", LOADERS, ids=lambda cls: cls.__name__)
def test_pickles_are_not_opened(load, file, rewrite, tmp_path):
    folder = rewrite()
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "it ran"
    with open(folder / file, "wb") as opened:
        pickle.dump(Bomb(mark), opened)
    with pytest.raises(ValueError, match="pickled weights only") as caught:
        load.from_pretrained(folder)
    assert file in message(caught) and "safetensors.torch.save_file" in message(caught)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        load.from_pretrained(folder, use_safetensors=False)
    assert not mark.exists()


def test_an_index_that_leads_to_a_pickle(rewrite, tmp_path):
    folder = rewrite(files=2)
    mark = tmp_path / "it ran"
    with open(folder / "evil.bin", "wb") as opened:
        pickle.dump(Bomb(mark), opened)
    index = folder / "model.safetensors.index.json"
    for which in ("model-00001-of-00002", "model-00002-of-00002"):
        changed = index.read_text().replace(f"{which}.safetensors", "evil.bin")
        changed_folder = rewrite(files=2)
        (changed_folder / "model.safetensors.index.json").write_text(changed)
        with open(changed_folder / "evil.bin", "wb") as opened:
            pickle.dump(Bomb(mark), opened)
        with pytest.raises(ValueError, match=r"evil\.bin is not a safetensors file"):
            NemotronHForCausalLM.from_pretrained(changed_folder, weights_only=False)
        assert not mark.exists()


def test_safetensors_are_preferred(rewrite, tmp_path):
    """A pickle beside them is not even looked at."""
    folder = rewrite()
    mark = tmp_path / "it ran"
    with open(folder / "pytorch_model.bin", "wb") as opened:
        pickle.dump(Bomb(mark), opened)
    _, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and not mark.exists()


def test_no_weights_at_all(rewrite):
    folder = rewrite()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_nothing_is_said_of_a_good_checkpoint(rewrite, caplog):
    with caplog.at_level(logging.WARNING):
        NemotronHForCausalLM.from_pretrained(rewrite(files=3))
        NemotronHModel.from_pretrained(rewrite())
    assert "LOAD REPORT" not in caplog.text


def test_headers_only(rewrite, monkeypatch):
    """The check before loading reads no tensor: a wrong expert is found although no value could be read."""
    folder = rewrite(without(EXPERT))

    def no_loading(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", no_loading)
    with pytest.raises(ValueError, match=re.escape(EXPERT)):
        NemotronHForCausalLM.from_pretrained(folder)


def test_token_classifier(rewrite):
    with pytest.raises(ValueError, match=re.escape(EXPERT)):
        NemotronHForTokenClassification.from_pretrained(rewrite(without(EXPERT)))


@pytest.mark.parametrize(
    "name, base, expert, published",
    [
        ("model.layers.1.mixer.experts.up_proj", False, 3, EXPERT),
        ("layers.1.mixer.experts.up_proj", True, 3, EXPERT),
        ("mtp.layers.1.mixer.experts.down_proj", False, 0, MTP_EXPERT),
        ("model.norm_f.weight", False, None, "backbone.norm_f.weight"),
        ("norm_f.weight", True, None, "backbone.norm_f.weight"),
        ("lm_head.weight", False, None, "lm_head.weight"),
        ("score.weight", False, None, "score.weight"),
    ],
)
def test_published_name(name, base, expert, published):
    assert published_name(name, base, expert) == published
