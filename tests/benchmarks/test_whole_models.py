"""The benchmarks of whole models at the release's mix, on a small model on a CPU: they run, and they measure what they say."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from nemotron_super import NemotronHConfig, NemotronHForCausalLM, preset


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: a benchmark's module."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    yield importlib.import_module
    transformers.logging.set_verbosity(verbosity)  # other tests read what transformers reports
    torch.set_num_threads(threads)


def test_super_on_one_gpu(script, monkeypatch):
    module = script("super_on_one_gpu")
    monkeypatch.setattr(module, "seconds", lambda work, device, repeats=3: [work(), 0.5][1])
    counted = []

    def noted(*args, **options):
        counted.append(options)
        return 0.25

    monkeypatch.setattr(module, "step_seconds", noted)
    found = module.main(
        ["--preset", "tiny", "--device", "cpu", "--context", "40", "--new-tokens", "4", "--drafts", "3"]
    )
    assert found["prefill, tokens/s"] == 28 / 0.5 and found["plain, tokens/s"] == 4.0
    assert found["tokens/s if all drafts were kept"] == 16.0
    assert counted == [{}, {"use_mtp": True, "num_assistant_tokens": 3}]
    # 5 Mamba layers and 6 mixtures: two projections each, and the experts of each mixture.
    kinds = preset("tiny").layers_block_type
    assert found["quantised modules"] == 2 * kinds.count("linear_attention") + 3 * kinds.count("moe")
    assert 0.015 < found["weights, GB"] < 0.03


def test_a_step_is_what_more_tokens_take(script, monkeypatch):
    """Reading the prompt is subtracted, and with drafts it is steps that are counted, not tokens."""
    module = script("super_on_one_gpu")
    config = preset("tiny")
    model = module.build(config, "release", "cpu")
    prompt = torch.randint(3, config.vocab_size, (1, 5))
    calls = {"n": 0}
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: calls.update(n=calls["n"] + 1) or forward(*a, **k))

    def seconds(work, device):
        calls["n"] = 0
        work()
        return 10.0 + calls["n"] * 0.5  # half a second for a call of the backbone

    monkeypatch.setattr(module, "seconds", seconds)
    with torch.inference_mode():
        assert module.step_seconds(model, prompt, 6, "cpu") == pytest.approx(0.5)
        assert module.step_seconds(model, prompt, 6, "cpu", use_mtp=True, num_assistant_tokens=2) == pytest.approx(0.5)
        out = model(prompt)
    assert out.logits.isfinite().all() and out.logits.std() > 0.01


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--context", "60", "--new-tokens", "60"], "leaves no prompt"),
        (["--offload-experts", "9"], "has 6 quantised sets"),
    ],
)
def test_what_cannot_be_measured(script, arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        script("super_on_one_gpu").main(["--preset", "tiny", "--device", "cpu", *arguments])
    assert words in f"{error.value} {capsys.readouterr().err}"


def test_slice_in_the_mix(script, monkeypatch, capsys):
    module = script("slice_in_the_mix")
    monkeypatch.setattr(module, "seconds", lambda work, device, repeats: [work(), 0.5][1])
    batches = []

    def noted(model, prompt, *_):
        batches.append(prompt.shape)
        return 0.25

    monkeypatch.setattr(module, "step_seconds", noted)
    runs = module.main(
        ["--preset", "tiny", "--device", "cpu", "--prompt", "8", "--new-tokens", "2", "--prefill", "16"]
    )
    assert batches == [(1, 8), (8, 8)] * 2
    for run in runs.values():
        assert run["decode batch 1, ms"] == run["decode batch 8, ms"] == 250 and run["prefill 16, ms"] == 500
    assert runs["release"]["weights, GB"] < 0.8 * runs["BF16"]["weights, GB"]
    assert "at most 1.13" in capsys.readouterr().out


def test_a_failure_is_part_of_the_table(script, monkeypatch, capsys):
    """One thing that does not run does not lose the others."""
    module = script("slice_in_the_mix")
    monkeypatch.setattr(module, "seconds", lambda *_, **__: 0.5)
    monkeypatch.setattr(module, "step_seconds", lambda *_, **__: [][0])
    run = module.main(["--preset", "tiny", "--device", "cpu", "--prefill", "16"])["release"]
    assert run["decode batch 8, ms"].startswith("IndexError") and run["prefill 16, ms"] == 500


def test_same_loss(script, tmp_path, monkeypatch):
    """Without a GPU both sources are the reference: the same seed ends at the same loss, another seed does not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stream = np.random.default_rng(0).integers(3, 8192, 2000).astype(np.uint16)
    stream[::50] = 1
    for part in ("train", "heldout"):
        np.save(tmp_path / f"{part}.npy", stream)
    sizes = {"steps": 2, "evaluations": 2, "rows": 2, "length": 24, "windows": 3}
    flags = [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    record = script("same_loss").main(["--data", str(tmp_path), *flags])
    assert record["tokens a step"] == 48
    losses = [run["held-out loss"] for run in record["runs"].values()]
    assert all(list(loss) == ["1", "2"] and abs(loss["1"] - 9) < 1 and loss["1"] != loss["2"] for loss in losses)
    differences = record["differences of the held-out loss"]
    assert differences["reference - kernels"] == [0, 0] and all(differences["other seed - kernels"])


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_latent_size": 8, "moe_intermediate_size": 8, "pad_token_id": 0, "eos_token_id": None,
    "moe_shared_expert_intermediate_size": 8, "hybrid_override_pattern": "ME*",
}  # fmt: skip


@pytest.mark.parametrize("ours", [True, False])
def test_against_transformers(script, monkeypatch, ours):
    """Everything runs on both; which of the two a process measures is its own affair."""
    module = script("against_transformers")
    monkeypatch.setitem(module.SHAPES, "cpu", SMALL)
    monkeypatch.setitem(module.WORK, "cpu", ([8], [2], (4, 3), (8, "M*"), 1))
    found = module.measure("cpu", "float32", ours)
    names = {"prefill 8, tokens/s", "decode batch 2, tokens/s", "train 8, tokens/s", "peak, MB"}
    # Of so few tokens a step's time is a difference that may be anything; a failure would be text.
    assert found.keys() == names and all(isinstance(value, float) for value in found.values())
    assert found["prefill 8, tokens/s"] > 0 and found["train 8, tokens/s"] > 0


def test_weights_used(script):
    """A token sees half of these four experts of two 8 x 8 matrices, and the embeddings not at all."""
    model = NemotronHForCausalLM(NemotronHConfig(**SMALL))
    used, head = script("against_transformers").weights_used(model)
    assert head == 64 * 16
    assert used == sum(p.numel() for p in model.parameters()) - 64 * 16 - 2 * 2 * 8 * 8
