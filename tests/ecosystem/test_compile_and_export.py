"""`torch.compile` without graph breaks or recompilation for every length, and `torch.export`, both equal to eager."""

from __future__ import annotations

import io

import pytest
import torch
from nemotron_super import HybridCache
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

LENGTHS = (11, 17, 5, 8, 33, 64, 70)  # below, at and above the chunk of 8, odd and even


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiled code of one test must not serve another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_inputs(kind: str, batch: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Inputs and labels: `whole` rows, rows `padded` on the left, or `packed` with two documents."""
    ids = torch.randint(5, 261, (batch, length), generator=torch.Generator().manual_seed(length))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :3] = 0
        inputs["labels"][0, :3] = -100
    elif kind == "packed":
        inputs["seq_idx"] = (torch.arange(length) >= length // 2).int().expand(batch, -1).contiguous()
    return inputs


def train_step(model, call, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses (all, next token, MTP) and gradients of one step through `call`."""
    model.zero_grad()
    output = call(**inputs)
    output.loss.backward()
    parts = torch.stack([output.loss, output.lm_loss, output.mtp_loss]).detach()
    return parts, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert all(grad.any() for grad in expected[1].values())
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_inference(model, kind):
    inputs = make_inputs(kind)
    inputs.pop("labels")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(**inputs, output_mtp_logits=True)
        found = compiled(**inputs, output_mtp_logits=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.mtp_logits, expected.mtp_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found.cache.get_seq_length() == 11


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_training(tiny_model, kind):
    """One graph from the tokens to the loss, MTP included, and the gradients of eager."""
    model = tiny_model().train()
    inputs = make_inputs(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(train_step(model, compiled, inputs), train_step(model, model, inputs))


def test_training_with_checkpointing(tiny_model):
    model = tiny_model().train()
    inputs = {**make_inputs("whole"), "use_cache": False}
    expected = train_step(model, model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(train_step(model, compiled, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_inductor(tiny_model, mode):
    """Generated code: inference on padded rows, and a training step."""
    model = tiny_model(hybrid_override_pattern="ME*")
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    if mode == "training":
        model.train()
        inputs = make_inputs("whole")
        assert_same_step(train_step(model, compiled, inputs), train_step(model, model, inputs))
        return
    inputs = make_inputs("padded")
    inputs.pop("labels")
    with torch.no_grad():
        found, expected = compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["whole", "padded"])
def test_new_lengths_do_not_recompile(model, kind):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in LENGTHS:
            inputs = make_inputs(kind, length=length)
            inputs.pop("labels")
            found, expected = compiled(**inputs).logits, model(**inputs).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_new_lengths_do_not_recompile_training(tiny_model):
    model = tiny_model().train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in (11, 17, 5, 64):
        inputs = make_inputs("padded", length=length)
        assert_same_step(train_step(model, compiled, inputs), train_step(model, model, inputs))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize(("kind", "graphs"), [("static", 1), ("hybrid", 2)])
def test_decoding(model, ids, kind, graphs):
    """Token by token from a cache: one graph for a cache of fixed size, and one more for a cache that grows."""
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=32) if static else HybridCache(model.config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :4], cache=cache, use_cache=True)
        for position in range(4, ids.shape[1]):
            found = compiled(ids[:, position : position + 1], cache=cache, use_cache=True).logits
            torch.testing.assert_close(found[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= graphs


def test_generate_compiles(model, ids):
    """`generate` with a static cache compiles the decoding step, and gives the tokens of eager."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    counters.clear()
    found = model.generate(ids, cache_implementation="static", compile_config=how, **options)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert found.equal(model.generate(ids, **options))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["whole", "padded"])
def test_export(model, kind, strict):
    """One exported program for every batch and length, before and after it was saved."""
    inputs = make_inputs(kind)
    inputs.pop("labels")
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {**dict.fromkeys(inputs, free), "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for exported in (program.module(), torch.export.load(file).module()):
            for batch, length in ((2, 11), (3, 40), (2, 5), (4, 64)):
                inputs = make_inputs(kind, batch, length)
                inputs.pop("labels")
                found, expected = exported(**inputs, use_cache=False), model(**inputs, use_cache=False)
                torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_export_has_the_scan_as_one_node(model, ids):
    """Loops over chunks and experts do not unroll into the graph, whatever the length."""
    sizes = {}
    for length in (11, 200):
        tokens = ids[:, :1].expand(-1, length).contiguous()
        with torch.no_grad():
            graph = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False).graph
        sizes[length] = len(graph.nodes)
        assert sum("ssd_chunk_scan" in str(node.target) for node in graph.nodes) == 1
    assert sizes[11] == sizes[200]


def test_transformers_exporter(model, ids):
    """transformers' own exporter, for a whole sequence of any length."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    config = DynamoConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, free))
    model.config.use_cache = False
    exported = DynamoExporter().export(model, inputs, config=config)
    for length in (11, 40):
        tokens = make_inputs("whole", 3, length)["input_ids"]
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        with torch.no_grad():
            expected = model(tokens, attention_mask=mask).logits
            found = exported(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["static", "hybrid"])
def test_transformers_exporter_with_cache(model, ids, kind):
    """transformers' own exporter, for one step from a cache."""
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=32) if static else HybridCache(model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, use_cache=True)
        inputs = {"input_ids": ids[:, 4:5], "cache": cache, "use_cache": True}
        exported = DynamoExporter().export(model, inputs, config=DynamoConfig())
        torch.testing.assert_close(exported(**inputs).logits[:, 0], model(ids).logits[:, 4], rtol=1e-4, atol=1e-4)


@pytest.mark.xfail(raises=AttributeError, strict=True, reason="transformers exports key/value caches only")
def test_executorch_recipe(model):
    """transformers' older ExecuTorch recipe wants keys and values in every layer of the cache."""
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 32}
    TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
