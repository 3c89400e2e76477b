"""What is saved is the published inventory: names, shapes and dtypes, written out here a second time."""

import time

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.conversion.inventory import published_inventory
from safetensors import safe_open

BF16, F32 = torch.bfloat16, torch.float32


def mixer(kind: str, c) -> dict[str, tuple[int, ...]]:
    """Tensors of one mixer, from the published tables."""
    inner = c.mamba_num_heads * c.mamba_head_dim
    states = c.n_groups * c.ssm_state_size
    latent = c.moe_latent_size or c.hidden_size
    if kind == "M":
        tensors = {
            "in_proj.weight": (2 * inner + 2 * states + c.mamba_num_heads, c.hidden_size),
            "conv1d.weight": (inner + 2 * states, 1, c.conv_kernel),
            "A_log": (c.mamba_num_heads,),
            "D": (c.mamba_num_heads,),
            "dt_bias": (c.mamba_num_heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (c.hidden_size, inner),
        }
        if c.use_conv_bias:
            tensors["conv1d.bias"] = (inner + 2 * states,)
        return tensors
    if kind == "*":
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return {
            "q_proj.weight": (query, c.hidden_size),
            "k_proj.weight": (key, c.hidden_size),
            "v_proj.weight": (key, c.hidden_size),
            "o_proj.weight": (c.hidden_size, query),
        }
    if kind == "-":
        return {
            "up_proj.weight": (c.intermediate_size, c.hidden_size),
            "down_proj.weight": (c.hidden_size, c.intermediate_size),
        }
    tensors = {
        "gate.weight": (c.n_routed_experts, c.hidden_size),
        "gate.e_score_correction_bias": (c.n_routed_experts,),
        "shared_experts.up_proj.weight": (c.moe_shared_expert_intermediate_size, c.hidden_size),
        "shared_experts.down_proj.weight": (c.hidden_size, c.moe_shared_expert_intermediate_size),
    }
    if c.moe_latent_size:
        tensors["fc1_latent_proj.weight"] = (latent, c.hidden_size)
        tensors["fc2_latent_proj.weight"] = (c.hidden_size, latent)
    for e in range(c.n_routed_experts):
        tensors[f"experts.{e}.up_proj.weight"] = (c.moe_intermediate_size, latent)
        tensors[f"experts.{e}.down_proj.weight"] = (latent, c.moe_intermediate_size)
    return tensors


def expected_inventory(config, dtype=BF16):
    width = (config.hidden_size,)
    table = {
        "backbone.embeddings.weight": (config.vocab_size, config.hidden_size),
        "backbone.norm_f.weight": width,
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (config.vocab_size, config.hidden_size)

    def layer(prefix, kind):
        table[f"{prefix}.norm.weight"] = width
        table.update({f"{prefix}.mixer.{name}": shape for name, shape in mixer(kind, config).items()})

    for i, kind in enumerate(config.hybrid_override_pattern):
        layer(f"backbone.layers.{i}", kind)
    pattern = config.mtp_hybrid_override_pattern
    for depth in range(config.num_nextn_predict_layers):
        for inner, kind in enumerate(pattern):
            prefix = f"mtp.layers.{depth * len(pattern) + inner}"
            layer(prefix, kind)
            if inner == 0:
                table[f"{prefix}.enorm.weight"] = table[f"{prefix}.hnorm.weight"] = width
                table[f"{prefix}.eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
            if inner == len(pattern) - 1:
                table[f"{prefix}.final_layernorm.weight"] = width
    return {name: (shape, F32 if name.endswith("e_score_correction_bias") else dtype) for name, shape in table.items()}


def elements(inventory, prefix=""):
    return sum(torch.Size(shape).numel() for name, (shape, _) in inventory.items() if name.startswith(prefix))


def test_super():
    """The published numbers of Nemotron 3 Super."""
    start = time.process_time()
    found = published_inventory(preset("super"))
    assert time.process_time() - start < 20
    assert len(found) == 42_683
    assert elements(found) == 123_611_033_088
    assert elements(found, "mtp.") == 2_942_325_248
    assert elements(found) - elements(found, "mtp.") == 120_668_707_840
    assert sum(name.startswith("mtp.") for name in found) == 1_040
    assert sum(dtype == F32 for _, dtype in found.values()) == 41
    assert sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in found.values()) == 247_222_108_160


@pytest.mark.parametrize(
    "name, shape",
    [
        ("backbone.embeddings.weight", (131072, 4096)),
        ("lm_head.weight", (131072, 4096)),
        ("backbone.norm_f.weight", (4096,)),
        ("backbone.layers.0.norm.weight", (4096,)),
        ("backbone.layers.0.mixer.in_proj.weight", (18560, 4096)),
        ("backbone.layers.0.mixer.conv1d.weight", (10240, 1, 4)),
        ("backbone.layers.0.mixer.conv1d.bias", (10240,)),
        ("backbone.layers.0.mixer.A_log", (128,)),
        ("backbone.layers.0.mixer.D", (128,)),
        ("backbone.layers.0.mixer.dt_bias", (128,)),
        ("backbone.layers.0.mixer.norm.weight", (8192,)),
        ("backbone.layers.0.mixer.out_proj.weight", (4096, 8192)),
        ("backbone.layers.7.mixer.q_proj.weight", (4096, 4096)),
        ("backbone.layers.7.mixer.k_proj.weight", (256, 4096)),
        ("backbone.layers.7.mixer.v_proj.weight", (256, 4096)),
        ("backbone.layers.7.mixer.o_proj.weight", (4096, 4096)),
        ("backbone.layers.1.mixer.gate.weight", (512, 4096)),
        ("backbone.layers.1.mixer.gate.e_score_correction_bias", (512,)),
        ("backbone.layers.1.mixer.fc1_latent_proj.weight", (1024, 4096)),
        ("backbone.layers.1.mixer.fc2_latent_proj.weight", (4096, 1024)),
        ("backbone.layers.1.mixer.experts.0.up_proj.weight", (2688, 1024)),
        ("backbone.layers.87.mixer.experts.511.down_proj.weight", (1024, 2688)),
        ("backbone.layers.1.mixer.shared_experts.up_proj.weight", (5376, 4096)),
        ("backbone.layers.1.mixer.shared_experts.down_proj.weight", (4096, 5376)),
        ("mtp.layers.0.enorm.weight", (4096,)),
        ("mtp.layers.0.hnorm.weight", (4096,)),
        ("mtp.layers.0.eh_proj.weight", (4096, 8192)),
        ("mtp.layers.0.norm.weight", (4096,)),
        ("mtp.layers.0.mixer.q_proj.weight", (4096, 4096)),
        ("mtp.layers.1.norm.weight", (4096,)),
        ("mtp.layers.1.mixer.experts.511.up_proj.weight", (2688, 1024)),
        ("mtp.layers.1.mixer.gate.e_score_correction_bias", (512,)),
        ("mtp.layers.1.final_layernorm.weight", (4096,)),
    ],
)
def test_shapes_of_super(name, shape, super_inventory):
    assert super_inventory[name] == (shape, F32 if name.endswith("correction_bias") else BF16)


@pytest.fixture(scope="module")
def super_inventory():
    return published_inventory(preset("super"))


@pytest.mark.parametrize("name", ["super", "nano", "lightning", "ultra", "tiny"])
def test_inventory_of_the_family(name):
    config = preset(name)
    assert published_inventory(config) == expected_inventory(config)


VARIANTS = {
    "every layer": {},
    "two physical depths": {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*-E"},
    "one layer a depth": {"num_nextn_predict_layers": 3, "mtp_hybrid_override_pattern": "E"},
    "no latent width": {"moe_latent_size": None},
    "tied": {"tie_word_embeddings": True},
    "no convolution bias": {"use_conv_bias": False},
    "without MTP": {"num_nextn_predict_layers": 0},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_files_hold_the_inventory(fields, dtype, make_config, tmp_path):
    """Saved for real: exactly these tensors, in these shapes and dtypes."""
    config = make_config("ME*-", **{"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", **fields})
    NemotronHForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: (tuple(file.get_tensor(name).shape), file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert found == expected_inventory(config, dtype) == published_inventory(config, dtype)
