"""Recorded steps on a GPU: token for token what running them gives, in float32 and, where it is decidable, in bfloat16."""

import argparse
import dataclasses
import inspect
import tempfile
import textwrap
from pathlib import Path

import nemotron_super
import pytest
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.modeling import cuda_graphs
from nemotron_super.modeling.captured_decoding import CapturedReader, DecodeStep, borrow_cache
from nemotron_super.modeling.choosing import Choice
from nemotron_super.modeling.static_cache import StaticHybridCache
from transformers import AutoTokenizer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: CUDA graphs are recorded here"),
]
# Head and state sizes of the release, so that the compiled kernels serve.
WIDTHS = {
    "hybrid_override_pattern": "MEM*EME", "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_latent_size": 128, "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
    "initializer_range": 0.1, "rescale_prenorm_residual": False,
}  # fmt: skip
TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
WAYS = [{}, {"use_mtp": True, "num_assistant_tokens": 3}]
CHOICES = [
    Choice(drawn=False),
    Choice(True, [TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9)]),
]


@pytest.fixture(scope="module")
def gpu_model():
    """`gpu_model(dtype)`: random, the same weights in each dtype."""

    def build(dtype, **changes):
        torch.manual_seed(0)
        return NemotronHForCausalLM(preset("tiny", **WIDTHS | changes)).eval().to(dtype).cuda()

    return build


def ask(model, rows, length, new, **extra):
    torch.manual_seed(length)
    ids = torch.randint(3, 4096, (rows, length)).cuda()
    mask = torch.ones_like(ids)
    mask[1:, : length // 3] = 0
    return model.generate(
        ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=new, pad_token_id=0, **{"do_sample": False} | extra
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_fp8_keys_and_values(gpu_model, way, rows):
    """Read as they are stored, against the cache that grows and dequantises them."""
    model = gpu_model(torch.float32)
    for length in (9, 70, 33):
        expected = ask(model, rows, length, 48, cache_implementation="quantized")
        found = ask(model, rows, length, 48, cache_implementation="static", cache_config={"backend": "fp8"}, **way)
        assert found.equal(expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_float32(gpu_model, way, rows):
    """Three prompts one after another: the later ones are replayed from their first token on."""
    model = gpu_model(torch.float32)
    for length in (9, 70, 33):
        expected = ask(model, rows, length, 48)
        found = ask(model, rows, length, 48, cache_implementation="static", **way)
        assert found.equal(expected)
    # Room for any of them, so that it is the cache just used.
    cache = borrow_cache(model, rows, 70 + 47)
    assert cache.graphs.reason is None and len(cache.graphs) > 0


@pytest.mark.parametrize("drafter", ["prompt", "assistant"])
def test_other_drafters(gpu_model, drafter):
    """Prompt lookup and an assistant model, in float32: the text of plain decoding."""
    model = gpu_model(torch.float32)
    way = {"prompt_lookup_num_tokens": 4}
    if drafter == "assistant":
        way = {"assistant_model": gpu_model(torch.float32, hybrid_override_pattern="M*E", num_nextn_predict_layers=0)}
    for length in (9, 70):
        assert ask(model, 1, length, 48, **way).equal(ask(model, 1, length, 48))


def test_float32_steps_of_many_tokens(gpu_model):
    """Experts that would have to know their tokens' numbers on the host stay out of recordings: kernels serve up to 128 tokens."""
    model = gpu_model(torch.float32)
    way = {"use_mtp": True, "num_assistant_tokens": 7}
    for rows, recorded in ((5, True), (17, False)):
        for length in (9, 70):
            assert ask(model, rows, length, 24, cache_implementation="static", **way).equal(
                ask(model, rows, length, 24)
            )
        reason = borrow_cache(model, rows, 70 + 23).graphs.reason
        assert reason is None if recorded else "more than 128 tokens" in reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_replayed_is_what_runs(gpu_model, way, rows, monkeypatch):
    """In bfloat16 too, a replayed step gives the tokens of the same step run without recording."""
    model = gpu_model(torch.bfloat16)
    found = ask(model, rows, 40, 64, cache_implementation="static", **way)
    again = ask(model, rows, 40, 64, cache_implementation="static", **way)
    monkeypatch.setattr(cuda_graphs, "why_not_recorded", lambda *args: "not in this test")
    expected = ask(model, rows, 40, 64, cache_implementation="static", **way)
    assert found.equal(expected) and again.equal(expected)


def decided_tokens(model, ids, length, logits):
    """Which tokens behind `length` plain decoding would write again, however its sums are ordered: (new,) bool.

    Noise is measured, not assumed: the same text read in pieces of different lengths, which runs other kernels and other orders
    of summation. A token is decided if its lead over every other token is more than twice what that lead changes by between
    readings, and than the step in which bfloat16 counts there, below which readings agree by rounding alone.
    """
    readings = []
    with torch.no_grad():
        for piece in (ids.shape[1], 16, 5, 1):
            cache, parts = model.model(ids[:, :1], use_cache=True).cache, []
            for part in ids[:, 1:-1].split(piece, dim=1):
                parts.append(model(part, cache=cache).logits[0].float())
            readings.append(torch.cat(parts)[length - 2 :])
    readings.append(logits)
    best = ids[0, length:, None]
    leads = [reading.gather(1, best) - reading for reading in readings]
    noise = torch.stack([(lead - leads[-1]).abs() for lead in leads]).amax(0)
    noise = noise.maximum(logits.gather(1, best).abs() * 2**-7)
    return ((leads[-1] > 2 * noise).scatter(1, best, True)).all(1)


def compare_decided(model, prompts, new, way):
    """Tokens of plain decoding behind (1, length) prompts; which of them are decided; which `way` writes otherwise.

    Behind a token that differs, `way` goes on from plain's text. Returns three numbers of tokens: all, decided, and decided
    but written otherwise.
    """
    total = checked = wrong = 0
    fixed = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in prompts:
        length = prompt.shape[1]
        plain = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **fixed)
        ids = plain.sequences
        decided = decided_tokens(model, ids, length, torch.cat(plain.logits).float())
        start = length
        while start < ids.shape[1]:
            rest = fixed | {"max_new_tokens": ids.shape[1] - start, "cache_implementation": "static"}
            differs = (model.generate(ids[:, :start], **rest, **way) != ids)[0].nonzero()
            if not len(differs):
                break
            wrong += int(decided[int(differs[0]) - length])
            start = int(differs[0]) + 1
        total, checked = total + new, checked + int(decided.sum())
    print(f"{checked} of {total} tokens decided, {wrong} of them written otherwise")
    return total, checked, wrong


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bfloat16(gpu_model, way):
    """The same token as plain decoding wherever that is decided.

    Every expert is chosen: between two that are nearly tied, rounding chooses, once in some hundred tokens, and the text behind
    differs by more than the readings of another text show. In float32, above, few are chosen.
    """
    model = gpu_model(torch.bfloat16, n_routed_experts=8, num_experts_per_tok=8)
    torch.manual_seed(0)
    prompts = [torch.randint(3, 4096, (1, length)).cuda() for length in (9, 70, 33, 120)]
    total, checked, wrong = compare_decided(model, prompts, 64, way)
    assert checked > 0.3 * total and not wrong


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bfloat16_of_a_trained_model(way):
    """With experts chosen by its router, on text of the kind it knows: a router's near tie may cost one token in two hundred."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = NemotronHForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).cuda()
    texts = [inspect.getsource(module)[:2000] for module in (argparse, dataclasses, textwrap, tempfile)]
    prompts = [torch.tensor([tokenizer(text).input_ids[:150]]).cuda() for text in texts]
    total, checked, wrong = compare_decided(model, prompts, 128, way)
    assert checked > 0.6 * total and wrong <= 0.005 * checked


def test_sampling(gpu_model):
    """The same seed gives the same text, and leaves the generator in the same place."""
    model = gpu_model(torch.float32)
    texts = []
    for cache in (None, *["static"] * 3):  # run, recorded, replayed
        text = ask(model, 2, 20, 40, do_sample=True, top_p=0.9, cache_implementation=cache)
        texts.append((text, torch.rand(1, device="cuda")))
    assert all(text.equal(texts[0][0]) and rand.equal(texts[0][1]) for text, rand in texts)


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.6, "temperature": 0.3}], ids=str)
def test_sampled_rounds(how, gpu_model, chance_of_difference):
    """Three tokens of many rows, from replayed steps and from replayed rounds of drafts, have the same distribution."""
    # Without experts, which would differ by rounding, and in float32 with so many rows not be recorded.
    model = gpu_model(
        torch.float32, hybrid_override_pattern="M*M-", mtp_hybrid_override_pattern="*-", intermediate_size=256
    )
    ids = torch.randint(3, 4096, (1, 20), generator=torch.Generator().manual_seed(0)).cuda().expand(2048, -1)
    options = {"do_sample": True, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, **how}
    samples = []
    for way in WAYS:
        for _ in range(3):
            text = model.generate(ids, cache_implementation="static", **options, **way)
        samples.append(text[:, 20:23])
    assert len(borrow_cache(model, 2048, 24).graphs) and chance_of_difference(*samples) > 1e-3


def test_a_step_does_not_wait(gpu_model):
    """Run without recording, under CUDA's own watch; recording a step that waits would fail by itself."""
    model = gpu_model(torch.bfloat16)
    with torch.no_grad():
        cache = StaticHybridCache(model.config, 64)
        token = model(torch.randint(3, 4096, (2, 9)).cuda(), cache=cache).logits[:, -1].argmax(-1)
        step = DecodeStep(model, cache, 2, None)
        for _ in range(3):
            step(token)
            for choice in CHOICES:
                step.follow(choice)
        reader = CapturedReader(model, StaticHybridCache(model.config, 256), None)
        token = reader.read_prompt(torch.randint(3, 4096, (2, 9)).cuda(), None, None)[:, -1].argmax(-1)
        reader.begin(token)
        reader.begin_rounds([100, 100], {5})
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.compute(64, lambda logits: None)
            step(token)
            for choice in CHOICES:
                step.follow(choice)
                for _ in range(4):  # run, recorded, replayed
                    reader.start_round(3, choice)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graphs_are_recorded_again_when_all_were_forgotten():
    """Though what a forgotten one left behind still lies in its memory."""
    device, left, x = torch.device("cuda", 0), [], torch.ones(4, device="cuda")
    for _ in range(3):
        graph = cuda_graphs.CUDAGraphs()
        graph.reason, graph._device = None, device
        for _ in range(3):
            graph.run("step", lambda: left.append(x + 1))
        assert len(graph) == 1 and left[-1].eq(2).all()
        del graph


def test_long_text_keeps_few_graphs(gpu_model):
    """2,000 tokens: one graph for each power of two, no memory beyond."""
    model = gpu_model(torch.bfloat16)
    ask(model, 1, 20, 2000, cache_implementation="static", eos_token_id=None)
    before = torch.cuda.memory_allocated()
    ask(model, 1, 35, 2000, cache_implementation="static", eos_token_id=None)
    assert torch.cuda.memory_allocated() - before < 1 << 20
    cache = borrow_cache(model, 1, 2000)
    assert len(cache.graphs) == 4  # 256, 512, 1024, 2048
