"""What serves each op: the choice, how it is forced, how it fails, and the table that says so."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from nemotron_super import NVFP4Config, cli, quantize_model
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.conventions import PACKAGES
from nemotron_super.kernels_hub.registry import KernelError, use_kernels

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a machine with a GPU the kernels are compiled, and do not take CPU tensors"
)


def norm_inputs(dtype=torch.float32):
    return torch.randn(3, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-5


def test_on_a_cpu_the_reference_serves_every_op():
    for name, op in registry.OPS.items():
        source, function, reason = op.choose(*registry._example(name, torch.device("cpu"), torch.bfloat16))
        assert (source, function) == ("torch", op.reference)
        assert "Triton serves 'cuda'" in reason and "no kernel repository" in reason


def test_on_a_cpu_nothing_stands_between_the_call_and_the_reference(monkeypatch):
    monkeypatch.setattr(registry.Op, "choose", lambda *args: pytest.fail("the choice was made again"))
    x, weight, eps = norm_inputs()
    assert torch.equal(registry.rms_norm(x, weight, eps), registry.rms_norm.reference(x, weight, eps))


def test_models_call_the_registry(make_model, monkeypatch):
    served = set()
    call = registry.Op.__call__

    def note(op, *args, **kwargs):
        served.add(op.name)
        return call(op, *args, **kwargs)

    monkeypatch.setattr(registry.Op, "__call__", note)
    make_model("MEM*E").generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, min_new_tokens=3)
    for recipe in ("nvfp4", "fp8"):
        model = make_model("E", hidden_size=32, moe_latent_size=16, moe_intermediate_size=16)
        quantize_model(model, NVFP4Config(recipe=recipe))(torch.tensor([[3, 4, 5]]))
    # For training, for drafted tokens, for caches of fixed size, and what nothing calls before it was measured on a GPU.
    others = {
        "linear_cross_entropy",
        "causal_conv1d_replay",
        "selective_state_replay",
        "add_rms_norm",
        "decode_attention",
        "fill_slots",
        "likeliest",
        "keep_drafts",
    }
    assert served == set(registry.OPS) - others
    served.clear()
    model = make_model("MEM*E", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    ids = torch.tensor([[3, 4, 5]])
    model.train()(ids, labels=ids)
    model.eval().generate(ids, max_new_tokens=6, min_new_tokens=6, use_mtp=True)
    model.generate(ids, max_new_tokens=3, cache_implementation="static", eos_token_id=None)
    model.generate(ids, max_new_tokens=3, cache_implementation="static", eos_token_id=None, use_mtp=True)
    assert served >= others - {"add_rms_norm"}


@interpreted
def test_a_context_forces_and_gives_back():
    x, weight, eps = norm_inputs()
    assert registry.rms_norm.choose(x, weight, eps)[0] == "torch"
    with use_kernels("triton"):
        assert registry.rms_norm.choose(x, weight, eps)[0] == "triton"
        found = registry.rms_norm(x, weight, eps)
        with use_kernels(rms_norm="torch"):
            assert registry.rms_norm.choose(x, weight, eps)[0] == "torch"
            assert registry._forced["gated_rms_norm"] == "triton"
        with use_kernels("auto"):
            assert registry._forced == {}
        assert registry.rms_norm.choose(x, weight, eps)[0] == "triton"
    assert registry._forced == {}
    torch.testing.assert_close(found, registry.rms_norm(x, weight, eps), rtol=1e-6, atol=1e-6)


def test_a_context_gives_back_after_an_error():
    with pytest.raises(ZeroDivisionError), use_kernels("torch"):
        raise ZeroDivisionError
    assert registry._forced == {}


def test_contexts_that_end_in_another_order():
    """As those of two threads may."""
    first, second = use_kernels("torch"), use_kernels(rms_norm="triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert registry._forced == {"rms_norm": "triton"}
    second.__exit__(None, None, None)
    assert registry._forced == {}


def test_arguments_may_all_be_named():
    x, weight, eps = norm_inputs()
    assert torch.equal(registry.rms_norm(weight=weight, x=x, eps=eps), registry.rms_norm(x, weight, eps))
    assert registry.rms_norm.choose(x=x, weight=weight, eps=eps)[0] == "torch"


@interpreted
@pytest.mark.parametrize("broken", [False, True])
def test_an_installed_package_that_cannot_be_loaded(broken, tmp_path, monkeypatch):
    """As where it was compiled for another torch, or is of a version without this kernel."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (folder / "layernorm_gated.py").write_text("raise OSError('undefined symbol')" if broken else "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.conventions.INSTALLED, "mamba_ssm", True)
    x, weight, eps = norm_inputs()
    with use_kernels(gated_rms_norm="package"):
        with pytest.raises(KernelError) as error:
            registry.gated_rms_norm(x, x, weight, eps, 4)
        words = ["mamba_ssm is installed", "`rmsnorm_fn`", "undefined symbol" if broken else "has no attribute"]
        assert all(word in str(error.value) for word in words)
        (line,) = [line for line in registry.report("cpu").splitlines() if line.startswith("gated_rms_norm")]
        assert line.split()[1] == "none" and words[2] in line
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


@interpreted
@pytest.mark.parametrize(
    "op, args, words",
    [
        ("rms_norm", norm_inputs(torch.float64), ["`rms_norm`", "'triton'", "float64", "bfloat16"]),
        ("rms_norm", (torch.ones(2, 70000), torch.ones(70000), 1e-5), ["70000 wide", "65536"]),
        ("topk_routing", (torch.ones(2, 8), torch.ones(8), 2, True, 1.0, 4, 2), ["`n_group` is 4"]),
        (
            "moe_experts",
            (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), *[torch.ones(3, 8, 8).mT] * 2),
            ["`up` has strides", "contiguous"],
        ),
        (
            "causal_conv1d_update",
            (torch.ones(2, 4, 6).mT, torch.ones(2, 6), torch.ones(6, 4)),
            ["`state` has strides", "contiguous"],
        ),
        (
            "selective_state_update",
            (torch.ones(1, 2, 4, 4).half(), torch.ones(1, 2, 4), *[torch.ones(1, 2), -torch.ones(2)], *[torch.ones(1, 1, 4)] * 2, torch.ones(2)),
            ["`state` is torch.float16", "stochastically"],
        ),
        (
            "ssd_chunk_scan",
            (torch.ones(1, 4, 2, 80), *[torch.ones(1, 4, 2), -torch.ones(2)], *[torch.ones(1, 4, 1, 8)] * 2, torch.ones(2)),
            ["head_dim 80", "16, 32, 64"],
        ),
        ("step_and_decay", (torch.ones(0, 4, 2), torch.ones(2), torch.ones(2)), ["0 rows", "1 to 65535"]),
    ],
)  # fmt: skip
def test_a_forced_kernel_that_cannot_serve_says_why(op, args, words):
    with torch.no_grad(), use_kernels("triton"), pytest.raises(KernelError) as error:
        getattr(registry, op)(*args)
    assert all(word in str(error.value) for word in words), error.value


@interpreted
def test_kernels_without_a_gradient_refuse_one():
    args = [torch.ones(2, 6, 4), torch.ones(2, 6, requires_grad=True), torch.ones(6, 4)]
    with use_kernels("triton"), pytest.raises(KernelError, match="no gradient"):
        registry.causal_conv1d_update(*args)
    with use_kernels("triton"), pytest.raises(KernelError, match="no gradient"):
        registry.step_and_decay(torch.ones(1, 3, 2), torch.ones(2), torch.ones(2, requires_grad=True))


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_kernels("triton"), pytest.raises(KernelError, match="tensors are on 'cpu'"):
        registry.rms_norm(*norm_inputs())


def test_no_repository_was_added():
    with use_kernels(rms_norm="hub"), pytest.raises(KernelError, match="no kernel repository was added"):
        registry.rms_norm(*norm_inputs())


@pytest.mark.parametrize("setting, words", [("tritn", ["tritn", "triton"]), ("rms=torch", ["'rms'", "rms_norm"])])
def test_unknown_names(setting, words):
    with pytest.raises(KernelError) as error:
        registry._parse(setting)
    assert all(word in str(error.value) for word in [*words, registry.SETTING])


def test_unknown_names_of_a_context():
    with pytest.raises(KernelError, match="`use_kernels` names the op 'rms'"), use_kernels(rms="torch"):
        pass


@pytest.mark.parametrize("device, words", [("nowhere", "device type"), ("cuda:99", "torch sees")])
def test_a_device_that_is_not_there(device, words):
    with pytest.raises(SystemExit, match=words):
        cli.main(["kernels", "--device", device])


def test_setting():
    assert registry._parse("") == registry._parse("auto") == {}
    forced = registry._parse(" torch, rms_norm=triton, moe_experts=auto")
    assert forced.pop("rms_norm") == "triton"
    assert forced == dict.fromkeys(set(registry.OPS) - {"rms_norm", "moe_experts"}, "torch")


def test_the_environment_is_read(tmp_path):
    code = "from nemotron_super.kernels_hub import registry; print(registry._forced)"
    environment = {**os.environ, registry.SETTING: "rms_norm=torch"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'rms_norm': 'torch'}"


def test_report_and_command(capsys):
    cli.main(["kernels", "--device", "cpu", "--dtype", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu, float32" and len(lines) == 3 + len(registry.OPS)
    assert all(line.split()[1] == "torch" for line in lines[2:-1])
    assert lines[-1].split()[:2] == ["attention", "transformers"] and "flash_attn is not installed" in lines[-1]
    assert all(any(f"package: {p.package} is not installed" in line for line in lines) for p in PACKAGES.values())
    with use_kernels("torch"):
        assert registry.report("cpu").count("forced by `use_kernels`") == len(registry.OPS)
    with use_kernels(rms_norm="hub"):
        assert "none" in registry.report("cpu") and "no kernel repository was added" in registry.report("cpu")


@interpreted
def test_a_small_model_in_the_interpreter(make_model, relative):
    """Logits and gradients of a whole model, every op served by Triton."""
    model = make_model("MEM*E", scale=2.0)
    ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
    results = []
    experts = "moe_experts"  # float32 experts with gradients have no kernel
    for forced in ({"source": "torch"}, {"source": "triton", experts: "torch"}):
        with use_kernels(**forced):
            out = model(ids, labels=ids, use_cache=False)
            results.append([out.logits, *torch.autograd.grad(out.loss, list(model.model.parameters()))])
    for found, expected in zip(results[1], results[0], strict=True):
        assert relative(found, expected) < 1e-4
    with use_kernels("triton"):
        found = model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False))


@interpreted
def test_the_kernels_library_loads_the_repository(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(registry, "_repositories", [])
    registry.add_kernel_repository(registry.BUNDLE)
    try:
        x, weight, eps = norm_inputs()
        with use_kernels(rms_norm="hub"):
            assert registry.rms_norm.choose(x, weight, eps)[0] == "hub"
            found = registry.rms_norm(x, weight, eps)
        torch.testing.assert_close(found, registry.rms_norm(x, weight, eps), rtol=1e-6, atol=1e-6)
        # Operators of one name would take each other down: whoever still held the first died in the next call.
        namespaces = [registry._repositories[0]._ops.NAMESPACE, registry._bundle()._ops.NAMESPACE]
        assert namespaces[0] != namespaces[1]
    finally:
        for op in registry.OPS.values():
            op.kernels.pop("hub", None)


def test_a_repository_on_the_hub_needs_a_version():
    with pytest.raises(KernelError, match="version"):
        registry.add_kernel_repository("nobody/no-kernels")


def test_the_repository_is_well_formed():
    rust = pytest.importorskip("kernels._rust")
    build = tomllib.loads((registry.BUNDLE / "build.toml").read_text())
    assert rust.Build.open(registry.BUNDLE).general is not None
    metadata = rust.Metadata.read_from_file(registry.BUNDLE / "build" / "torch-cuda" / "metadata.json")
    assert metadata.name.python_name == build["general"]["name"].replace("-", "_")
    assert metadata.version == build["general"]["version"]
    for needed in ("CARD.md", "tests/test_kernels.py", "benchmarks/benchmark_sequence.py"):
        assert (registry.BUNDLE / needed).is_file()


def test_the_kernels_know_nothing_of_the_package():
    for file in Path(registry.BUNDLE).rglob("*.py"):
        assert "nemotron_super" not in file.read_text(), file
