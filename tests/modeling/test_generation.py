"""Drafts change the speed and never the text: MTP, prompt lookup and assistant models against plain decoding."""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.generation import MTPGenerateOutput
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from nemotron_super.modeling.speculative import accept, target_tokens
from nemotron_super.modeling.static_cache import StaticHybridCache
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
PATTERNS = ["ME*M-", "M-M", "*-*", "ME"]
# In CI a sample; the whole is run with NEMOTRON_GENERATION_CASES=10000 NEMOTRON_SAMPLING_DRAWS=50000.
CASES = int(os.environ.get("NEMOTRON_GENERATION_CASES", 120))
DRAWS = int(os.environ.get("NEMOTRON_SAMPLING_DRAWS", 5000))


@settings(max_examples=CASES, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    mtp=st.sampled_from(["*E", "E", "*", "-*"]),
    seed=st.integers(0, 30),
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    padding=st.booleans(),
    depth=st.integers(1, 7),
    schedule=st.sampled_from(["constant", "heuristic"]),
    threshold=st.sampled_from([None, 0.3]),
    new=st.integers(1, 14),
    eos=st.sampled_from([None, 5, [5, 17, 40]]),
    processors=st.sampled_from([{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}]),
    forbid=st.booleans(),
    stop=st.sampled_from([None, (5, 5), (17, 40)]),
    chunk=st.sampled_from([None, 1, 3]),
    cache=st.sampled_from([None, "static"]),
)
@example(  # without an end-of-sequence token a finished row goes on beside the others
    pattern="M-M", mtp="*E", seed=10, rows=2, length=1, padding=False, depth=1, schedule="constant", threshold=None, new=3,
    eos=None, processors={}, forbid=False, stop=(5, 5), chunk=None, cache=None,
)  # fmt: skip
def test_greedy_is_the_same_text(
    pattern,
    mtp,
    seed,
    rows,
    length,
    padding,
    depth,
    schedule,
    threshold,
    new,
    eos,
    processors,
    forbid,
    stop,
    chunk,
    cache,
    make_model,
    prompts,
    rules,
):
    # A small scale repeats itself, so that drafts are kept; a large one does not, so that they are refused.
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2], **MTP | {"mtp_hybrid_override_pattern": mtp})
    ids, mask = prompts(rows, length, padding, seed)
    options = {
        "attention_mask": mask, "max_new_tokens": new, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0, **processors
    }  # fmt: skip

    def write(**extra):
        return model.generate(
            ids,
            logits_processor=LogitsProcessorList([rules.Forbid()] if forbid else []),
            stopping_criteria=StoppingCriteriaList([rules.StopAfter(stop)] if stop else []),
            **options,
            **extra,
        )

    plain = write()
    drafts = {"num_assistant_tokens": depth, "num_assistant_tokens_schedule": schedule}
    if threshold:
        drafts["assistant_confidence_threshold"] = threshold
    found = write(use_mtp=True, prefill_chunk_size=chunk, cache_implementation=cache, **drafts)
    assert found.tolist() == plain.tolist()


@settings(max_examples=CASES // 2, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    how=st.sampled_from(["prompt lookup", "assistant", "itself"]),
    other=st.sampled_from(["M*", "*-", "ME", "M"]),
    seed=st.integers(0, 30),
    length=st.integers(1, 12),
    repeats=st.integers(1, 3),
    left=st.integers(0, 3),
    depth=st.integers(1, 9),
    schedule=st.sampled_from(["constant", "heuristic", "heuristic_transient"]),
    threshold=st.sampled_from([0.0, 0.3]),
    ngram=st.integers(1, 4),
    new=st.integers(1, 20),
    eos=st.sampled_from([None, 5, [5, 17, 40]]),
    processors=st.sampled_from([{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}]),
    stop=st.sampled_from([None, (5, 5), (17, 40)]),
    cache=st.sampled_from([None, "static"]),
)
def test_other_drafters_write_the_same_text(
    pattern, how, other, seed, length, repeats, left, depth, schedule, threshold, ngram, new, eos, processors, stop, cache,
    make_model, prompts, rules,
):  # fmt: skip
    """Prompt lookup, and assistants that agree seldom or always; transformers takes one row at a time."""
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2])
    ids = prompts(1, length, False, seed)[0].repeat(1, repeats)
    mask = torch.ones_like(ids)
    mask[:, : min(left, ids.shape[1] - 1)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    if how == "prompt lookup":
        drafts = {"prompt_lookup_num_tokens": depth, "max_matching_ngram_size": ngram}
    else:
        assistant = model if how == "itself" else make_model(other, seed=seed + 1, scale=1.0)
        assistant.generation_config.num_assistant_tokens = depth
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        assistant.generation_config.assistant_confidence_threshold = threshold
        drafts = {"assistant_model": assistant}

    def write(**extra):
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([rules.StopAfter(stop)] if stop else []),
            **processors,
            **extra,
        )

    assert write(cache_implementation=cache, **drafts).tolist() == write().tolist()


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_a_stop_inside_a_draft(how, make_model, rules):
    """The text ends where the rule is met, though more of the draft would be kept."""
    model = make_model("ME*")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # always writes token 0
    ids = torch.tensor([[7, 0, 0, 0, 0, 0, 7]])
    if how == "prompt lookup":
        drafts = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}
    else:
        model.generation_config.num_assistant_tokens = 5
        model.generation_config.num_assistant_tokens_schedule = "constant"
        drafts = {"assistant_model": model}
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    found = model.generate(ids, stopping_criteria=[rules.StopAfter((0, 0))], **options, **drafts)
    assert found[0, ids.shape[1] :].tolist() == [0, 0]


def test_a_stop_rule_leaves_the_schedule_of_an_assistant_alone(make_model, rules):
    """What a call has found out about how many drafts are worth while is there for the next call."""
    model = make_model("ME*")
    model.generation_config.num_assistant_tokens = 2
    model.generation_config.num_assistant_tokens_schedule = "heuristic"
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    rule = rules.StopAfter((-1, -1))  # never met
    model.generate(torch.tensor([[7, 8, 9]]), assistant_model=model, stopping_criteria=[rule], **options)
    assert model.generation_config.num_assistant_tokens > 2


def test_an_assistant_reads_a_padding_token_as_text(make_model, prompts):
    """A text may hold the token that pads: what was written is never padding."""
    model, assistant = make_model("ME"), make_model("M*", seed=1, scale=1.0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # always writes token 0
    ids, _ = prompts(1, 4, False, 0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, assistant_model=assistant, **options)
    assert found.tolist() == [[*ids[0].tolist(), *[0] * 8]]


def chi_square(counts, expected):
    """p-value of counts against expected counts; rare outcomes taken together."""
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(1 - torch.special.gammainc((len(expected) - 1) / torch.tensor(2.0).double(), statistic / 2))


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_acceptance_preserves_the_distribution(sharpness):
    """50,000 draws of two drafted tokens and one behind, each against its own distribution."""
    torch.manual_seed(0)
    draws, vocab = 50_000, 12
    q = (sharpness * torch.randn(2, vocab)).softmax(-1)
    scores = sharpness * torch.randn(3, vocab)
    scores[0, 3] = -torch.inf
    drafts = torch.stack([torch.multinomial(part, draws, replacement=True) for part in q], dim=1)
    own = target_tokens(scores.expand(draws, -1, -1), drafts, q.expand(draws, -1, -1))
    kept, behind = accept(drafts, own)
    written = torch.cat([drafts, torch.zeros(draws, 1).long()], 1)
    written.scatter_(1, kept.unsqueeze(1), behind.unsqueeze(1))
    for position, p in enumerate(scores.softmax(-1)):
        # Whether a position is reached does not depend on what is drawn there.
        here = written[kept >= position, position]
        assert chi_square(torch.bincount(here, minlength=vocab), p * len(here)) > 1e-3
    assert 0.01 < (kept == 2).float().mean() < 0.9, "both outcomes must occur"


@pytest.fixture
def make_decided_model(make_model):
    """`make_model`, whose next token depends on the whole text: by itself a small random model draws almost evenly."""

    def build(*args, **kwargs):
        model = make_model(*args, **kwargs)
        with torch.no_grad():
            model.lm_head.weight.mul_(5)
        return model

    return build


SAMPLING = [{"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 4}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("how", SAMPLING, ids=str)
def test_sampling_is_the_same_distribution(how, cache, make_decided_model, chance_of_difference):
    """The first three tokens of many rows, with and without drafts, as one outcome."""
    model = make_decided_model("ME*", scale=4.0, seed=1, vocab_size=7, **MTP)
    options = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": None, "pad_token_id": 0, **how}
    ids = torch.tensor([[3, 1, 4]]).expand(DRAWS, -1)
    outcomes = []
    for extra in ({}, {"use_mtp": True, "num_assistant_tokens": 2, "cache_implementation": cache}):
        torch.manual_seed(1)
        outcomes.append(model.generate(ids, **options, **extra)[:, 3:6])
    assert chance_of_difference(*outcomes) > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sampling_padded_rows_is_the_same_distribution(cache, make_decided_model, chance_of_difference):
    """Rows of two prompts, one of them padded, which accept different numbers of drafts."""
    model = make_decided_model("ME*", scale=4.0, seed=1, vocab_size=5, **MTP)
    ids = torch.tensor([[3, 1, 4], [0, 0, 2]]).repeat(DRAWS // 2, 1)
    options = {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]).repeat(DRAWS // 2, 1), "max_new_tokens": 8}
    options |= {"do_sample": True, "temperature": 0.8, "eos_token_id": None, "pad_token_id": 0}
    outcomes = []
    for extra in ({}, {"use_mtp": True, "num_assistant_tokens": 2, "cache_implementation": cache}):
        torch.manual_seed(1)
        # Two of the last tokens, behind several steps; the prompt's last says which of the two it was.
        outcomes.append(model.generate(ids, **options, **extra)[:, [2, 8, 9]])
    assert chance_of_difference(*outcomes) > 1e-3


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_sampling_with_other_drafters_is_the_same_distribution(how, make_decided_model, chance_of_difference):
    """transformers' own loop and acceptance over this cache, one row at a time: fewer draws, for each is a call."""
    draws = DRAWS // 10
    model = make_decided_model("M*", scale=4.0, vocab_size=5)
    ids = torch.tensor([[3, 1, 4, 3, 1]])
    options = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None, "pad_token_id": 0, "temperature": 0.8}
    if how == "prompt lookup":
        drafts = {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    else:
        assistant = make_decided_model("M", seed=1, scale=4.0, vocab_size=5)
        assistant.generation_config.num_assistant_tokens = 2
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        drafts = {"assistant_model": assistant}
    torch.manual_seed(1)
    plain = model.generate(ids.expand(draws, -1), **options)
    found = torch.cat([model.generate(ids, **options, **drafts) for _ in range(draws)])
    assert chance_of_difference(plain[:, 8:10], found[:, 8:10]) > 1e-3


def test_output_scores_and_streamer(make_model, prompts, rules):
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(1, 6, False, 0)
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.2}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    streamer = rules.Recorder()
    plain = model.generate(ids, **options)
    found = model.generate(ids, use_mtp=True, num_assistant_tokens=3, streamer=streamer, **options)
    assert isinstance(found, MTPGenerateOutput) and found.sequences.equal(plain.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(found, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.cat(streamer.parts).equal(found.sequences[0]) and streamer.ended
    statistics = found.mtp_statistics
    assert statistics is streamer.mtp_statistics
    # The first token comes from the prompt's own call.
    assert statistics.tokens == 14 and statistics.tokens_per_step == 14 / statistics.steps
    assert len(statistics.acceptance_rate) <= 3 and all(0 <= rate <= 1 for rate in statistics.acceptance_rate)


@pytest.mark.parametrize("eos", [None, list(range(20))], ids=["no end", "ends"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_streamer_of_several_rows(cache, eos, make_model, prompts, rules):
    """It is given a token of every row at a time, as in plain decoding, though rows go on by different numbers of drafts."""
    model = make_model("ME*M-", seed=1, **MTP)
    ids, mask = prompts(3, 6, True, 1)
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": mask,
        "eos_token_id": eos,
    }
    plain, found = rules.Recorder(), rules.Recorder()
    expected = model.generate(ids, streamer=plain, **options)
    assert model.generate(ids, use_mtp=True, streamer=found, cache_implementation=cache, **options).equal(expected)
    assert [part.tolist() for part in found.parts] == [part.tolist() for part in plain.parts] and found.ended


def test_drafts_that_come_true(make_model, prompts):
    """Statistics where every draft is kept: a model that always writes the same token."""
    model = make_model("ME*", **MTP)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids, _ = prompts(2, 4, True, 0)
    found = model.generate(
        ids, use_mtp=True, num_assistant_tokens=3, max_new_tokens=13, do_sample=False, return_dict_in_generate=True
    )
    assert found.mtp_statistics.tokens_per_step == 4 and found.mtp_statistics.acceptance_rate == [1.0] * 3


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 30),
    rows=st.integers(1, 3),
    padding=st.booleans(),
    depth=st.integers(1, 7),
    new=st.integers(1, 14),
    implementation=st.sampled_from([None, "static", "quantized"]),
    again=st.booleans(),
    saved=st.booleans(),
)
@example(  # rows keep different numbers of drafts
    pattern="ME*M-", seed=3, rows=3, padding=True, depth=3, new=16, implementation=None, again=False, saved=True,
)  # fmt: skip
def test_the_returned_cache_continues(
    pattern, seed, rows, padding, depth, new, implementation, again, saved, make_model, prompts, tmp_path_factory
):
    """It is the one that plain decoding leaves: any call may go on with it, and it may be saved."""
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2], **MTP)
    ids, mask = prompts(rows, 7, padding, seed)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    begun = options | {"attention_mask": mask, "max_new_tokens": new, "cache_implementation": implementation}
    plain = model.generate(ids, **begun)
    found = model.generate(ids, use_mtp=True, num_assistant_tokens=depth, **begun)
    assert found.sequences.equal(plain.sequences)
    assert found.cache.get_seq_length() == found.sequences.shape[1] - 1
    cache = found.cache
    if saved:
        file = tmp_path_factory.mktemp("saved") / "a.safetensors"
        save_snapshot(cache, file, model, torch.cat([mask, mask.new_ones(rows, new - 1)], 1))
        cache = load_snapshot(file, model, kv_dtype=cache.kv_dtype)
    turn = torch.cat([found.sequences, prompts(rows, 3, False, 99)[0]], 1)
    options |= {"attention_mask": torch.cat([mask, mask.new_ones(rows, new + 3)], 1), "max_new_tokens": 9}
    expected = model.generate(turn, cache=plain.cache, **options)
    found = model.generate(turn, cache=cache, use_mtp=again, **options)
    assert found.sequences.equal(expected.sequences)
    if implementation != "static":
        for layer, plain_layer in zip(found.cache.layers, expected.cache.layers, strict=True):
            if getattr(plain_layer, "keys", None) is not None:
                assert layer.keys.shape == plain_layer.keys.shape


DRAFTERS: dict[str, dict] = {
    "none": {},
    "MTP": {"use_mtp": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},
}


@pytest.mark.parametrize("made", ["growing", "fixed"])
@pytest.mark.parametrize("how", DRAFTERS)
def test_a_cache_that_holds_the_beginning(how, made, make_model, prompts):
    """The prompt is the whole text, or what is new, with a mask of the whole text; nothing is read twice."""
    model, drafts = make_model("ME*M-", seed=2, **MTP), dict(DRAFTERS[how])
    if "assistant_model" in drafts:
        drafts["assistant_model"] = make_model("ME*M-", seed=2)
    rows = 2 if how in ("none", "MTP") else 1
    ids, mask = prompts(rows, 9, True, 1)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **options)[:, 9:]

    def filled(tokens):
        cache = HybridCache(model.config) if made == "growing" else StaticHybridCache(model.config, 32)
        with torch.no_grad():
            model(ids[:, :tokens], attention_mask=mask[:, :tokens], cache=cache)
        return cache

    for held in (3, 6):  # fewer and more than are new
        for chunk in (None, 2):
            for prompt in (ids, ids[:, held:]):
                cache = filled(held)
                found = model.generate(prompt, cache=cache, prefill_chunk_size=chunk, **options, **drafts)
                assert found[:, prompt.shape[1] :].equal(expected)
                assert cache.get_seq_length() == 16
    with pytest.raises(ValueError, match="`cache` already holds 9 tokens, and the prompt has 9"):
        model.generate(ids, cache=filled(9), **options, **drafts)


def test_new_tokens_alone_fit_beside_what_is_held(make_model):
    model, ids = make_model("ME*", **MTP), torch.full((1, 9), 5)
    for drafts, room in (({}, 15), ({"use_mtp": True}, 23)):
        cache = StaticHybridCache(model.config, room)
        with torch.no_grad():
            model(ids[:, :6], cache=cache)
        with pytest.raises(ValueError, match=f"A prompt of 9 tokens with 8 new ones.*max_cache_len={room + 1}"):
            model.generate(ids[:, 6:], attention_mask=torch.ones(1, 9), cache=cache, max_new_tokens=8, **drafts)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("end", ["padded", "overshot"])
def test_rows_that_end_apart_do_not_continue(implementation, end, make_model, prompts, rules, tmp_path):
    """Plain decoding has read padding behind those that ended early; and nothing behind the end of the longest."""
    model = make_model("ME*M-", seed=1, **MTP)
    ids, mask = prompts(3, 6, True, 1)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    if end == "padded":
        options["eos_token_id"] = list(range(20))
    else:
        with torch.no_grad():
            model.lm_head.weight.zero_()  # always writes token 0, so that all drafts are kept
        options |= {"eos_token_id": None, "stopping_criteria": [rules.StopAfter((0, 0))]}
    found = model.generate(
        ids, use_mtp=True, num_assistant_tokens=3, return_dict_in_generate=True, cache_implementation=implementation,
        **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match="rows of different lengths"):
        model.generate(found.sequences, cache=found.cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="rows of different lengths"):
        save_snapshot(found.cache, tmp_path / "a.safetensors", model)
    found.cache.reset()
    assert model.generate(ids, cache=found.cache, **options).equal(model.generate(ids, **options))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_cache_without_attention_continues(cache, make_model):
    """Only what is new is read, though nothing but the cache itself knows how much that is."""
    model = make_model("MM", seed=2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = model.generate(
        ids, cache_implementation=cache, max_cache_len=64 if cache else None, return_dict_in_generate=True, **options
    )
    turn = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], 1)
    assert model.generate(turn, cache=first.cache, **options).equal(model.generate(turn, **options))
    assert first.cache.get_seq_length() == turn.shape[1] + 5


WATERMARKS = {"lefthash": {"context_width": 2}, "selfhash": {"bias": 4.0}}


@pytest.mark.parametrize("scheme", WATERMARKS)
def test_a_watermark(scheme, make_model, prompts):
    """It is drawn anew from the text at each call, so that drafts do not disturb it."""
    watermark = WatermarkingConfig(seeding_scheme=scheme, **WATERMARKS[scheme])
    ids, mask = prompts(3, 6, True, 2)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    for scale in (1.0, 4.0):
        model = make_model("ME*M-", scale=scale, **MTP)
        expected = model.generate(ids, watermarking_config=watermark, **options)
        assert not expected.equal(model.generate(ids, **options))
        assert model.generate(ids, watermarking_config=watermark, use_mtp=True, **options).equal(expected)


STATEFUL = {
    "guidance_scale": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
    "watermarking_config": (
        {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]), "do_sample": True},
        "SynthIDTextWatermark",
    ),
}


@pytest.mark.parametrize("drafts", [{"use_mtp": True}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("case", STATEFUL)
def test_processors_with_a_state_are_refused(case, drafts, make_model):
    """They take each call for a token of the text; nothing has been read when they are found."""
    options, name = STATEFUL[case]
    cache = HybridCache((model := make_model("ME*", **MTP)).config)
    with pytest.raises(ValueError, match=f"`{case}`.*{name}"):
        model.generate(torch.tensor([[3, 4]]), cache=cache, max_new_tokens=3, **options, **drafts)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_what_a_schedule_finds_out(schedule, make_model, prompts):
    """`heuristic` goes on in the next call where this one ended, as with an assistant model; the others begin anew."""
    model = make_model("ME*", **MTP)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every draft is kept
    options = {"use_mtp": True, "max_new_tokens": 13, "do_sample": False, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "num_assistant_tokens_schedule": schedule}
    model.generation_config.num_assistant_tokens = 1
    ids, _ = prompts(1, 4, False, 0)
    first, second = (len(model.generate(ids, **options).mtp_statistics.acceptance_rate) for _ in range(2))
    assert (first, second) == {"constant": (1, 1), "heuristic": (5, 7), "heuristic_transient": (5, 5)}[schedule]
    assert model.generation_config.num_assistant_tokens == (7 if schedule == "heuristic" else 1)


def test_inputs_embeds(make_model, prompts):
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, mask = prompts(3, 7, True, 3)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **options)[:, 7:]
    assert model.generate(inputs_embeds=embeds, use_mtp=True, **options).equal(expected)


@pytest.mark.parametrize("how", ["MTP", "prompt lookup", "assistant"])
def test_inputs_embeds_beside_their_tokens(how, make_model):
    """The first drafts stand behind embeddings that were given; the prompt repeats itself, so that there are some."""
    ids, drafts = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6]]), dict(DRAFTERS[how])
    for seed, scale in ((3, 1.0), (0, 4.0), (3, 4.0)):
        model = make_model("ME*M-", seed=seed, scale=scale, **MTP)
        if "assistant_model" in drafts:
            drafts["assistant_model"] = make_model("ME*M-", seed=seed, scale=scale)
        options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, **options)
        embeds = model.get_input_embeddings()(ids)
        for chunk in (None, 4):
            found = model.generate(ids, inputs_embeds=embeds, prefill_chunk_size=chunk, **options, **drafts)
            assert found.equal(expected)


def test_several_continuations(make_model, prompts):
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(2, 5, False, 0)
    found = model.generate(ids, use_mtp=True, num_return_sequences=3, do_sample=True, max_new_tokens=6)
    assert found.shape == (6, 11)


def test_an_adapter_drafts_too(make_model, prompts):
    model = make_model("ME*M-", scale=1.0, **MTP)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj", "q_proj"], init_lora_weights=False))
    ids, _ = prompts(2, 5, True, 0)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert adapted.generate(ids, use_mtp=True, **options).equal(adapted.generate(ids, **options))


def test_a_learnt_prompt(make_model, prompts):
    """Prompt tuning's virtual tokens are read from a cache of fixed size too, and never left out in silence."""
    model = make_model("ME*M-", **MTP)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=5, token_dim=24, num_attention_heads=4
    )
    ids, mask = prompts(2, 6, False, 0)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(**options)
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.mul_(50)
    expected = tuned.generate(**options)
    assert not expected.equal(alone)
    assert tuned.generate(cache_implementation="static", **options).equal(expected)
    with pytest.raises(ValueError, match=r"`use_mtp`.*prompt tuning"):
        tuned.generate(use_mtp=True, **options)


def test_depth_by_default_is_the_trained_one(make_model, prompts):
    model = make_model("ME*", mtp_num_depths=3, **MTP)
    ids, _ = prompts(1, 5, False, 0)
    options = {"use_mtp": True, "max_new_tokens": 8, "return_dict_in_generate": True, "do_sample": False}
    assert len(model.generate(ids, **options).mtp_statistics.acceptance_rate) == 3
    model.generation_config.num_assistant_tokens = 1
    assert len(model.generate(ids, **options).mtp_statistics.acceptance_rate) == 1


WAYS = [{"use_mtp": True}, {"cache_implementation": "static"}, {"use_mtp": True, "cache_implementation": "static"}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_length_among_the_stopping_criteria(options, make_model, prompts):
    """It stands in for the configuration's, longer or shorter, as in plain decoding."""
    model = make_model("ME*M-", **MTP)
    ids, mask = prompts(3, 6, True, 0)
    shared = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
    for length in (8, 30):
        criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
        expected = model.generate(ids, stopping_criteria=criteria, **shared)
        assert expected.shape[1] == length
        assert model.generate(ids, stopping_criteria=criteria, **shared, **options).equal(expected)
    if "cache_implementation" in options:
        with pytest.raises(ValueError, match=r"6 tokens with 394 new ones.*does not fit"):
            model.generate(ids, stopping_criteria=[MaxLengthCriteria(400)], **shared, **options)


@pytest.mark.parametrize("change", ["half", "double", "fewer"])
def test_processors_that_change_dtype_or_vocabulary(change, make_model, prompts):
    model = make_model("ME*M-", **MTP)
    ids, mask = prompts(3, 6, True, 0)
    processor = {"half": lambda _, s: s.half(), "double": lambda _, s: s.double(), "fewer": lambda _, s: s[:, :30]}[
        change
    ]
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    options |= {"logits_processor": LogitsProcessorList([processor])}
    assert model.generate(ids, use_mtp=True, **options).equal(model.generate(ids, **options))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_nothing_to_draw_from(options, make_model):
    """Where no token is possible, none is made up: plain decoding raises a RuntimeError, too."""
    nothing = LogitsProcessorList([lambda _, scores: scores * 0 - torch.inf])
    with pytest.raises(RuntimeError, match="no token can be drawn"):
        make_model("ME*", **MTP).generate(
            torch.tensor([[3, 4]]), logits_processor=nothing, do_sample=True, max_new_tokens=3, **options
        )


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("implementation", [None, "static"])
def test_only_what_is_new_behind_a_cache(implementation, drafts, make_model, prompts):
    """With a mask of the whole text, the tokens that the cache holds need not be given again."""
    model = make_model("ME*M-", **MTP)
    rows = 1 if "prompt_lookup_num_tokens" in drafts else 3
    ids, mask = prompts(rows, 7, True, 1)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
    begun = options | {"cache_implementation": implementation, "max_cache_len": 64 if implementation else None}
    for new in (2, 5, 12):
        first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **begun)
        turn = prompts(rows, new, False, 9)[0]
        whole = torch.cat([first.sequences, turn], 1)
        longer = torch.cat([mask, mask.new_ones(rows, 5 + new)], 1)
        expected = model.generate(whole, attention_mask=longer, **options)
        only = torch.cat([first.sequences[:, -1:], turn], 1)
        found = model.generate(only, attention_mask=longer, cache=first.cache, **options, **drafts)
        assert found[:, -5:].equal(expected[:, -5:])


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize(
    "make", [HybridCache, lambda config: StaticHybridCache(config, 64)], ids=["growing", "static"]
)
def test_a_prompt_of_which_nothing_is_left_is_refused(make, drafts, make_model):
    model, ids = make_model("ME*", **MTP), torch.tensor([[3, 4, 5]])
    cache = make(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    for known in (ids, ids[:, :2]):
        with pytest.raises(ValueError, match="`cache` already holds 3 tokens"):
            model.generate(known, cache=cache, max_new_tokens=3, **drafts)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(ids[:, :0], max_new_tokens=3, **drafts)


@pytest.mark.parametrize("drafts", [{"use_mtp": True}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=64)])
def test_drafts_need_a_cache_of_our_own(make, drafts, make_model):
    model = make_model("ME*", **MTP)
    cache = make(model.config)
    with pytest.raises(ValueError, match=r"`HybridCache`, and `cache` is a (Dynamic|Static)Cache"):
        model.generate(torch.tensor([[3, 4]]), cache=cache, max_new_tokens=3, **drafts)
    with pytest.raises(ValueError, match=f"`cache` is a {type(cache).__name__}"):
        save_snapshot(cache, "unwritten", model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "default",
    [{"use_mtp": True}, {"cache_implementation": "static"}, {"use_mtp": True, "num_assistant_tokens": 2}],
    ids=str,
)
def test_an_assistant_with_defaults_of_its_own(default, make_model):
    """What an assistant's generation config asks for when it writes itself does not hold where it drafts."""
    model, assistant = make_model("ME*"), make_model("M*", seed=1, scale=1.0, **MTP)
    for name, value in default.items():
        setattr(assistant.generation_config, name, value)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[3, 4, 5]])
    assert model.generate(ids, assistant_model=assistant, **options).equal(model.generate(ids, **options))


def test_a_compiled_forward_holds_no_documents(make_model):
    """Positions that `generate` makes are of one document, also where a compiler has not looked at them."""
    model, ids = make_model("ME*"), torch.tensor([[3, 4, 5, 6]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    forward, model.forward = model.forward, torch.compile(model.forward, backend="eager")
    first = model.generate(ids, **options)
    model.forward = forward
    turn = torch.cat([first.sequences, ids], 1)
    assert model.generate(turn, cache=first.cache, **options).sequences.equal(
        model.generate(turn, **options).sequences
    )


@pytest.mark.parametrize("chunk", [0, -2, 2.5])
@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}], ids=str)
def test_a_chunk_of_no_tokens_is_refused(chunk, drafts, make_model):
    with pytest.raises(ValueError, match=f"`prefill_chunk_size` is {chunk}"):
        make_model("ME*", **MTP).generate(torch.tensor([[3, 4]]), prefill_chunk_size=chunk, max_new_tokens=3, **drafts)


def test_a_prompt_with_mtp_is_checked_as_any_other(make_model):
    model, ids = make_model("ME*", **MTP), torch.tensor([[3, 4], [5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(2, 3\), expected \(2, 2\)"):
        model.generate(ids, attention_mask=mask, use_mtp=True, max_new_tokens=3)
    with pytest.raises(ValueError, match="`input_ids` holds 99"):
        model.generate(torch.tensor([[3, 99]]), use_mtp=True, max_new_tokens=3)


BAD = {
    "zero": ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
    "negative": ({"num_assistant_tokens": -1}, "num_assistant_tokens"),
    "too deep": ({"num_assistant_tokens": 8}, "num_assistant_tokens"),
    "beams": ({"num_beams": 2}, "num_beams"),
    "two drafters": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation"),
    "schedule": (
        {"num_assistant_tokens_schedule": "foo"},
        "num_assistant_tokens_schedule.*'foo'.*'heuristic_transient'",
    ),
    "DoLa": ({"dola_layers": "high"}, "dola_layers"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "penalty_alpha"),
    "constrained": ({"force_words_ids": [[5]], "trust_remote_code": True}, "force_words_ids"),
    "ensemble": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "custom loop": ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
    "several processes": ({"synced_gpus": True}, "synced_gpus"),
    "compiled": ({"cache_implementation": "static", "compile_config": CompileConfig()}, "compile_config"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case, make_model):
    options, named = BAD[case]
    with pytest.raises(ValueError, match=named):
        make_model("ME*", **MTP).generate(torch.tensor([[3]]), use_mtp=True, max_new_tokens=3, **options)


IN_NO_WAY: dict[str, tuple[dict, str]] = {
    "no piece": ({"prefill_chunk_size": 0}, "`prefill_chunk_size` is 0"),
    "documents": ({"seq_idx": torch.zeros(1, 4, dtype=torch.long)}, "`seq_idx`.*rows of their own"),
    "positions": ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "`position_ids`.*rows of their own"),
    "depths": ({"mtp_num_depths": 2}, "`mtp_num_depths`.*`num_assistant_tokens`"),
    "mask": (
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        r"`attention_mask` has shape \(1, 6\), expected \(1, 4\)",
    ),
    "no prompt": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt is empty"),
}


@pytest.mark.parametrize("how", ["none", "MTP", "prompt lookup"])
@pytest.mark.parametrize("case", IN_NO_WAY)
def test_refused_however_it_is_decoded(case, how, make_model):
    options, named = IN_NO_WAY[case]
    options = {"input_ids": torch.tensor([[3, 4, 5, 6]]), **options}
    for cache in (None, "static"):
        with pytest.raises(ValueError, match=named):
            make_model("ME*", **MTP).generate(
                max_new_tokens=3, do_sample=False, cache_implementation=cache, **options, **DRAFTERS[how]
            )


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}], ids=str)
def test_a_prompt_that_does_not_fit(drafts, make_model):
    model, ids = make_model("ME*", **MTP), torch.full((1, 7), 5)
    options = {"cache_implementation": "static", "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **drafts}
    with pytest.raises(ValueError, match=r"7 tokens with 16 new ones.*`max_cache_len=21`.*22 or more"):
        model.generate(ids, max_new_tokens=16, max_cache_len=21, **options)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"7 tokens with 16 new ones.*`max_cache_len=3`"):
        model.generate(inputs_embeds=embeds, max_new_tokens=16, max_cache_len=3, **options)
    fits = model.generate(ids, max_new_tokens=16, max_cache_len=22, **options)
    assert fits.equal(model.generate(ids, max_new_tokens=16, **options))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=16, max_cache_len=22, **options).equal(fits[:, 7:])


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_needs_a_gpu(implementation, make_model):
    with pytest.raises(ValueError, match=f"'{implementation}'.*this model is on cpu"):
        make_model("ME*").generate(torch.tensor([[3]]), cache_implementation=implementation, max_new_tokens=3)


def test_refused_without_mtp_or_with_another_drafter(make_model):
    model = make_model("ME*")
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=0.*mtp\.layers"):
        model.generate(torch.tensor([[3]]), use_mtp=True, max_new_tokens=3)
    with pytest.raises(ValueError, match="assistant_model"):
        make_model("ME*", **MTP).generate(torch.tensor([[3]]), use_mtp=True, assistant_model=model, max_new_tokens=3)
