"""One step of the trainer through the Triton kernels, in bfloat16 on a GPU, beside the same step in float32 on the CPU."""

import copy

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.kernels_hub.registry import use_kernels
from nemotron_super.training.best_fit import BestFitRows, PadRows
from nemotron_super.training.documents import TokenDocument
from nemotron_super.training.lora import add_lora
from nemotron_super.training.trainer import NemotronTrainer
from transformers import TrainerCallback, TrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: training kernels run there"),
]
# Of all gradients together: their difference over their size. In bfloat16 a few tokens go to other experts: the torch
# reference on a CPU is 1.5 % away, with adapters 2.6 %.
TOLERANCE = 0.06
# Head and state sizes of the release, so that the compiled kernels serve.
WIDTHS = {
    "hybrid_override_pattern": "ME*E", "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_latent_size": 128, "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
    "initializer_range": 0.05,
}  # fmt: skip


class KeepGradients(TrainerCallback):
    """Of every parameter that trains, before the optimizer's step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=["full", "adapters"])
def model(request):
    """Random, with the values of bfloat16, in float32; with adapters on every linear map and the routed experts, or none."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(preset("tiny", **WIDTHS)).bfloat16().float()
    if request.param == "full":
        return model
    return add_lora(model, r=4, alpha=8, init_lora_weights=False)


def one_step(model, folder, device, dtype):
    """Gradients and logs of one step of packed documents on a copy of `model`, and how many parameters moved."""
    generator = torch.Generator().manual_seed(1)
    sizes = (40, 7, 23, 90, 64, 11, 128, 30, 100, 19)
    documents = [TokenDocument(torch.randint(3, 1024, (n,), generator=generator).tolist()) for n in sizes]
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=8, learning_rate=1e-2, max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=device == "cpu", disable_tqdm=True, remove_unused_columns=False,
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # not torch's DataParallel over all there are
    model, keep = copy.deepcopy(model).to(device, dtype), KeepGradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = NemotronTrainer(
        model,
        arguments,
        train_dataset=list(BestFitRows(documents, 128)),
        data_collator=PadRows(0),
        callbacks=[keep],
        router_bias_rate=0.0,
    )
    trainer.train()
    moved = sum(not p.detach().equal(before[name]) for name, p in model.named_parameters() if p.requires_grad)
    return keep.found, trainer.state.log_history[0], moved


def apart(found, expected):
    """Size of the difference of all gradients together, over their size."""
    difference = sum(float((found[name] - grad).square().sum()) for name, grad in expected.items())
    return (difference / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5


def test_one_step(model, tmp_path):
    expected, logs, _ = one_step(model, tmp_path, "cpu", torch.float32)
    with use_kernels("torch"):
        reference, _, _ = one_step(model, tmp_path, "cuda", torch.bfloat16)
    found, on_gpu, moved = one_step(model, tmp_path, "cuda", torch.bfloat16)
    assert found.keys() == expected.keys() and moved > 0.9 * len(found)
    assert any("experts" in name and "shared" not in name and grad.any() for name, grad in found.items())
    for name in ("loss", "lm_loss", "mtp_loss"):
        assert on_gpu[name] == pytest.approx(logs[name], rel=5e-3), name
    error = apart(found, expected)
    print(f"kernels {error:.4f}, torch {apart(reference, expected):.4f} away from float32")
    assert error < TOLERANCE and error < 2 * apart(reference, expected) + 1e-3
    assert any(not found[name].equal(reference[name]) for name in found), "the kernels served"
