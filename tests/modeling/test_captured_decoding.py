"""Fixed-size caches and recorded steps: the same text as with a cache that grows, nothing moves, the host never waits."""

import copy

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from nemotron_super.modeling import captured_decoding, cuda_graphs, static_cache
from nemotron_super.modeling.cache import HybridCache
from nemotron_super.modeling.captured_decoding import CapturedReader, DecodeStep, borrow_cache, forget_idle_caches
from nemotron_super.modeling.choosing import Choice
from nemotron_super.modeling.cuda_graphs import why_not_recorded
from nemotron_super.modeling.drafting import GrowingReader
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from nemotron_super.modeling.static_cache import StaticHybridCache, round_up
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
PATTERNS = ["ME*M-", "M-M", "*-*", "ME"]
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
CHOICES = [
    Choice(drawn=False),
    Choice(True, [TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9)]),
]


def tensors_of(cache):
    """Every tensor of a cache, by name."""
    found = {"positions": cache.slots.positions, "there": cache.slots.there, **cache.graphs.buffers}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values", "drafts"):
            if getattr(layer, name, None) is not None:
                found[f"{index}.{name}"] = getattr(layer, name)
        for name in ("conv_states", "recurrent_states"):
            if hasattr(layer, name):
                found[f"{index}.{name}"] = getattr(layer, name)[0]
    return found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 30),
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    padding=st.booleans(),
    new=st.integers(1, 14),
    eos=st.sampled_from([None, 5, [5, 17, 40]]),
    processors=st.sampled_from([{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}]),
    sampling=st.sampled_from([{"do_sample": False}, {"do_sample": True, "temperature": 0.7}, {"do_sample": True}]),
    forbid=st.booleans(),
    stop=st.sampled_from([None, (5, 5), (17, 40)]),
    chunk=st.sampled_from([None, 1, 3]),
    details=st.booleans(),
)
def test_the_same_text(
    pattern, seed, rows, length, padding, new, eos, processors, sampling, forbid, stop, chunk, details, make_model, replayed, prompts, rules):  # fmt: skip
    """Greedy and sampled from the same seed; afterwards the random numbers go on from the same place."""
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2])
    ids, mask = prompts(rows, length, padding, seed)
    written = []
    for cache in (None, "static"):
        torch.manual_seed(seed)
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            eos_token_id=eos,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([rules.Forbid()] if forbid else []),
            stopping_criteria=StoppingCriteriaList([rules.StopAfter(stop)] if stop else []),
            prefill_chunk_size=chunk,
            cache_implementation=cache,
            return_dict_in_generate=details,
            output_scores=details,
            output_logits=details,
            **processors,
            **sampling,
        )
        written.append((found.sequences if details else found, torch.rand(1), found))
    assert written[0][0].tolist() == written[1][0].tolist() and written[0][1] == written[1][1]
    if details:
        for name in ("scores", "logits"):
            for a, b in zip(written[0][2][name], written[1][2][name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert written[0][2].cache.get_seq_length() == written[1][2].cache.get_seq_length()


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    mtp=st.sampled_from(["*E", "E", "*", "-*"]),
    seed=st.integers(0, 30),
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    padding=st.booleans(),
    depth=st.integers(1, 7),
    schedule=st.sampled_from(["constant", "heuristic"]),
    new=st.integers(1, 16),
    eos=st.sampled_from([None, 5, [5, 17, 40]]),
    penalty=st.sampled_from([{}, {"repetition_penalty": 1.4}]),
    stop=st.sampled_from([None, (5, 5), (17, 40)]),
)
def test_drafts_give_the_same_text(
    pattern,
    mtp,
    seed,
    rows,
    length,
    padding,
    depth,
    schedule,
    new,
    eos,
    penalty,
    stop,
    make_model,
    replayed,
    prompts,
    rules,
):
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2], **MTP | {"mtp_hybrid_override_pattern": mtp})
    ids, mask = prompts(rows, length, padding, seed)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": eos, **penalty}

    def write(**extra):
        return model.generate(
            ids, stopping_criteria=[rules.StopAfter(stop)] if stop else [], **options, **extra
        ).tolist()

    drafts = {"use_mtp": True, "num_assistant_tokens": depth, "num_assistant_tokens_schedule": schedule}
    assert write(cache_implementation="static", **drafts) == write()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafts", [0, 3])
def test_later_calls_replay(drafts, rows, make_model, replayed, prompts):
    """A second call with another prompt records nothing, and nothing has moved."""
    model = make_model("ME*M-", scale=1.0, **MTP)
    options = GREEDY | {"max_new_tokens": 30, "cache_implementation": "static", "eos_token_id": None}
    options |= {"use_mtp": True, "num_assistant_tokens": drafts} if drafts else {}
    # Drafts come in few numbers a step, and each of them is recorded when it comes the second time.
    for seed in range(6 if drafts else 1):
        model.generate(prompts(rows, 5, True, seed)[0], **options)
    cache = borrow_cache(model, rows, 10)
    assert cache.slots.seen == 0 and len(cache.graphs) > 0
    places = {name: t.data_ptr() for name, t in tensors_of(cache).items()}
    captured_decoding.give_back_cache(model, cache, rows)
    before = dict(replayed.counts)
    ids, mask = prompts(rows, 8, True, 9)
    found = model.generate(ids, attention_mask=mask, **options)
    without = {
        k: v for k, v in options.items() if k not in ("cache_implementation", "use_mtp", "num_assistant_tokens")
    }
    assert found.equal(model.generate(ids, attention_mask=mask, **without))
    assert borrow_cache(model, rows, 10) is cache and {n: t.data_ptr() for n, t in tensors_of(cache).items()} == places
    if not drafts:
        assert dict(replayed.counts) == before


def test_a_step_does_not_wait(make_model, prompts, no_waiting):
    """With the model's own checks and its own operators (on a CPU its experts read the routing, as no GPU kernel does)."""
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(2, 6, False, 0)
    with torch.no_grad():
        cache = StaticHybridCache(model.config, 64)
        token = model(ids, cache=cache).logits[:, -1].argmax(-1)
        step = DecodeStep(model, cache, 2, None)
        with no_waiting():
            step(token)
            for choice in CHOICES:
                step.follow(choice)
        with pytest.raises(AssertionError, match="the host waits"), no_waiting():
            model(token.unsqueeze(1), attention_mask=torch.ones(2, 8, dtype=torch.long), cache=cache)

        reader = CapturedReader(model, StaticHybridCache(model.config, 64), None)
        token = reader.read_prompt(ids, None, None)[:, -1].argmax(-1)
        reader.begin(token)
        with no_waiting():
            for _ in range(2):
                first = reader.first_draft().argmax(-1)
                second = reader.next_draft(first).argmax(-1)
                reader.read(torch.cat([token.unsqueeze(1), first, second], dim=1))
                reader.settle([1, 2], token, [0, 1])
            reader.begin_rounds([20, 30], {5})
            for _ in range(2):
                for choice in CHOICES:
                    reader.start_round(3, choice)


def agree(model, strength):
    """Let most tokens follow from the one before alone, for the head as for the backbone, so that many drafts come true."""
    with torch.no_grad():
        embed = model.get_input_embeddings().weight
        width = embed.shape[1]
        embed.div_(embed.norm(dim=1, keepdim=True)).mul_(strength * width**0.5)
        model.lm_head.weight.copy_(embed.roll(11, 0))
        merge = model.mtp.layers[0].eh_proj.weight
        merge.zero_()[:, :width] = torch.eye(width)
    return model


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 30),
    rows=st.integers(1, 4),
    padding=st.booleans(),
    new=st.integers(1, 14),
    eos=st.sampled_from([None, 5, [5, 17, 40]]),
    sampling=st.sampled_from(
        [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "temperature": 1.3, "top_p": 0.8, "min_p": 0.02}]
    ),
)
@example(  # ends before its length, so that a step too many has drawn
    pattern="ME*M-",
    seed=1,
    rows=1,
    padding=False,
    new=14,
    eos=list(range(40)),
    sampling={"do_sample": True, "top_k": 0},
)
def test_steps_that_choose(pattern, seed, rows, padding, new, eos, sampling, make_model, replayed, prompts):
    """The token chosen by the step itself: the same text, the same random numbers are left, and nothing else is recorded."""
    model = make_model(pattern, seed=seed, scale=(1.0, 4.0)[seed % 2])
    ids, mask = prompts(rows, 5, padding, seed)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": eos} | sampling
    written = []
    for cache in ({}, *[{"cache_implementation": "static"}] * 3):
        torch.manual_seed(seed)
        written.append([*model.generate(ids, **options, **cache).flatten().tolist(), float(torch.rand(()))])
    assert written == [written[0]] * 4
    assert {name for (name, _), _ in borrow_cache(model, rows, 10).graphs._graphs} <= {"chosen token"}


@settings(max_examples=100, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 30),
    rows=st.integers(1, 4),
    padding=st.booleans(),
    depth=st.integers(1, 7),
    new=st.sampled_from([1, 2, 6, 9, 16, 25, 40]),
    ends=st.sampled_from([None, "token", "pair"]),
    tight=st.booleans(),
)
def test_whole_rounds(pattern, seed, rows, padding, depth, new, ends, tight, make_model, replayed, prompts, rules):
    """The text, and the states that are left, to the token: rows end at different times, inside of drafts and by their length."""
    model = agree(make_model(pattern, seed=seed, **MTP), (0.2, 0.4, 4.0)[seed % 3])
    ids, mask = prompts(rows, 5, padding, seed)
    cache = StaticHybridCache(model.config, 5 + new - 1 + 8 if tight else 64)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": None}
    criteria = []
    if ends is not None:
        *_, last, newest = model.generate(ids, **options)[0, : 6 + new // 2].tolist()
        # With an end-of-sequence token, even one that nobody writes, rows need not go on until the last has ended.
        options["eos_token_id"] = newest if ends == "token" else 2
        criteria = [rules.StopAfter((last, newest))] if ends == "pair" else []
    options |= {"use_mtp": True, "num_assistant_tokens": depth, "return_dict_in_generate": True}
    found, expected = (
        model.generate(ids, cache=kept, stopping_criteria=criteria, **options)
        for kept in (cache, HybridCache(model.config))
    )
    assert found.sequences.equal(expected.sequences)
    assert found.mtp_statistics == expected.mtp_statistics
    for row, text in enumerate(found.sequences[:, 5:].tolist()):
        stop, whole = options["eos_token_id"], [*ids[row].tolist(), *text]
        end = text.index(stop) + 1 if stop in text else len(text)
        if criteria:
            pairs = [i + 1 for i in range(len(text)) if (whole[i + 4], whole[i + 5]) == (last, newest)]
            end = min([end, *pairs])
        alone = torch.tensor([[*ids[row][mask[row] == 1].tolist(), *text[: end - 1]]])
        fresh = model.model(alone, use_cache=True).cache
        for kept, read in zip(cache.layers, fresh.layers, strict=True):
            if hasattr(read, "recurrent_states"):
                torch.testing.assert_close(
                    kept.recurrent_states[0][row], read.recurrent_states[0][0], atol=1e-4, rtol=1e-4
                )
                torch.testing.assert_close(kept.conv_states[0][row], read.conv_states[0][0], atol=1e-4, rtol=1e-4)
    if rows == 1:
        assert cache.get_seq_length() == found.sequences.shape[1] - 1


def test_drafts_behind_an_earlier_turn(make_model, prompts):
    """The head, which has not seen that turn, gives the logits that it gives on a cache that grows."""
    model = make_model("ME*M-", seed=1, scale=1.0, **MTP)
    earlier, ids = prompts(2, 20, False, 0)[0], prompts(2, 7, False, 1)[0]
    drafts = prompts(2, 3, False, 2)[0]
    found = []
    with torch.no_grad():
        for kind, cache in (
            (CapturedReader, StaticHybridCache(model.config, 64)),
            (GrowingReader, HybridCache(model.config)),
        ):
            model(earlier, cache=cache)
            reader, logits = kind(model, cache, None), []
            reader.read_prompt(torch.cat([earlier, ids], 1), None, None)
            reader.begin(drafts[:, 0])
            for kept in ([1, 1], [0, 2], [2, 1]):
                logits += [reader.first_draft().clone(), reader.next_draft(drafts[:, 1:2]).clone()]
                logits.append(reader.read(drafts).clone())
                reader.settle(kept, drafts[:, 0], [0, 1])
            found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_steps_reach_what_they_fill(make_model, monkeypatch, prompts):
    """Though the host may not know yet how far the rows have come."""
    monkeypatch.setattr(static_cache, "_SHORTEST_REACH", 8)
    monkeypatch.setattr(cuda_graphs, "why_not_recorded", lambda *args: "positions are looked at")
    model = agree(make_model("ME*M-", **MTP), 8.0)
    fixed, reaches = static_cache.Slots.fixed, set()

    def checked(self, tokens, reach, ahead=0):
        assert int(self.positions[:, ahead : ahead + tokens].max()) < reach
        reaches.add(reach)
        return fixed(self, tokens, reach, ahead)

    monkeypatch.setattr(static_cache.Slots, "fixed", checked)
    ids, mask = prompts(2, 6, True, 1)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 80, "eos_token_id": None}
    for depth in range(8):
        drafts = {"use_mtp": True, "num_assistant_tokens": depth} if depth else {}
        reaches.clear()
        assert model.generate(ids, cache_implementation="static", **options, **drafts).shape == (2, 86)
        assert len(reaches) > 3


def test_rounds_are_launched_ahead(make_model, monkeypatch, prompts, rules):
    """The next round before the host has seen this one: not where this one may be the last, nor for rules the device does not know."""
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(1, 6, False, 0)
    events, start, wait = [], CapturedReader.start_round, captured_decoding.HostCopy.wait

    def started(self, depth, choice):
        events.append("start")
        return start(self, depth, choice)

    def waited(self):
        events.append("wait")
        return wait(self)

    monkeypatch.setattr(CapturedReader, "start_round", started)
    monkeypatch.setattr(captured_decoding.HostCopy, "wait", waited)
    options = GREEDY | {"use_mtp": True, "num_assistant_tokens": 2, "cache_implementation": "static"}
    for criteria in ([], [rules.StopAfter((1, 2))]):
        events.clear()
        model.generate(ids, stopping_criteria=criteria, **options, **{"return_dict_in_generate": True})
        assert events.count("start") == events.count("wait") >= 3
        ahead = [
            events[: place + 1].count("start") - events[: place + 1].count("wait") for place in range(len(events))
        ]
        assert max(ahead) == (1 if criteria else 2)
        assert ahead[-3:] == [0, 1, 0]
    events.clear()
    model.generate(ids, output_logits=True, **options, **{"return_dict_in_generate": True})
    assert not events


def test_one_recording_serves_all_rounds(make_model, replayed, prompts):
    """From the first round on, of every prompt."""
    model = make_model("ME*M-", seed=3, scale=1.0, **MTP)
    options = GREEDY | {
        "use_mtp": True,
        "num_assistant_tokens": 3,
        "cache_implementation": "static",
        "max_new_tokens": 30,
    }
    for seed in range(3):
        model.generate(prompts(2, 5 + seed, True, seed)[0], **options)
    assert [key[0] for key in borrow_cache(model, 2, 10).graphs._graphs] == ["round"]


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True, "num_assistant_tokens": 2}], ids=["tokens", "rounds"])
def test_each_way_to_sample_is_recorded_for_itself(drafts, make_model, replayed, prompts, monkeypatch):
    """A setting is part of what is replayed; of many settings, the newest are kept."""
    monkeypatch.setattr(cuda_graphs, "_MOST_GRAPHS", 5)
    model = make_model("ME*M-", seed=3, scale=4.0, **MTP)
    ids, _ = prompts(2, 5, False, 0)
    options = GREEDY | {"max_new_tokens": 12, "cache_implementation": "static", "eos_token_id": None} | drafts
    greedy = model.generate(ids, **options)
    options |= {"do_sample": True, "top_k": 0}
    for temperature in (1e-4, 2.0, 3.0, 1e-4, 4.0, 5.0, 6.0, 7.0, 1e-4):
        for _ in range(3):
            found = model.generate(ids, temperature=temperature, **options)
            assert found.equal(greedy) == (temperature == 1e-4)
    graphs = borrow_cache(model, 2, 10).graphs
    assert len(graphs) == 5
    last = [key[-1] if drafts else key[0][1] for key in graphs._graphs][-1]
    assert last == Choice(True, [TemperatureLogitsWarper(1e-4)]).key


def test_nothing_is_compiled(make_model, monkeypatch, prompts):
    model = make_model("ME*", scale=1.0, **MTP)
    monkeypatch.setattr(model, "get_compiled_call", None)
    monkeypatch.setattr(torch, "compile", None)
    ids, _ = prompts(1, 6, False, 0)
    for extra in ({}, {"use_mtp": True}):
        assert model.generate(ids, cache_implementation="static", **extra, **GREEDY).shape == (1, 15)
    cache = borrow_cache(model, 1, 10)
    assert not cache.is_compileable  # what transformers looks at


@pytest.mark.parametrize(
    "extra", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_return_sequences": 2}], ids=str
)
def test_other_ways_of_decoding(extra, make_model, prompts):
    """What is not recorded works on the same cache."""
    model = make_model("ME*M-", scale=1.0)
    ids, _ = prompts(1, 6, False, 0)
    options = GREEDY | extra | {"do_sample": "num_return_sequences" in extra}
    found = []
    for cache in ("static", None):
        torch.manual_seed(0)
        found.append(model.generate(ids, cache_implementation=cache, **options))
    assert found[0].equal(found[1])


def test_hidden_states_are_still_given(make_model, prompts):
    model = make_model("ME*M-", scale=1.0)
    ids, _ = prompts(1, 6, False, 0)
    options = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True}
    found, expected = (model.generate(ids, cache_implementation=c, **options) for c in ("static", None))
    assert found.sequences.equal(expected.sequences) and len(found.hidden_states) == 9
    torch.testing.assert_close(found.hidden_states[-1][-1], expected.hidden_states[-1][-1], rtol=1e-4, atol=1e-4)


def test_inputs_embeds(make_model, replayed, prompts):
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, mask = prompts(3, 7, True, 3)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 7:]
    for extra in ({}, {"use_mtp": True}):
        found = model.generate(
            inputs_embeds=embeds, attention_mask=mask, cache_implementation="static", **GREEDY, **extra
        )
        assert found.equal(expected)


def test_streamer(make_model, replayed, prompts, rules):
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(1, 6, False, 0)
    streamer = rules.Recorder()
    found = model.generate(ids, streamer=streamer, cache_implementation="static", **GREEDY)
    assert torch.cat(streamer.parts).equal(found[0])


def test_rows_that_end_before_others(make_model, prompts, rules):
    """What a row has behind its end is padding, in the text and for a streamer."""
    model = make_model("ME*M-", scale=4.0)
    ids, mask = prompts(3, 5, False, 1)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None}
    texts = model.generate(ids, **options)[:, ids.shape[1] :]
    options["eos_token_id"] = int(texts[0, 2])
    expected = model.generate(ids, **options)
    ends = (expected[:, ids.shape[1] :] == options["eos_token_id"]).long().argmax(1)
    assert ends[0] < expected.shape[1] - ids.shape[1] - 1, "no row ends early"
    streamer = rules.Recorder()
    found = model.generate(ids, cache_implementation="static", streamer=streamer, **options)
    assert found.equal(expected)
    assert torch.stack(streamer.parts[1:], dim=1).equal(expected[:, ids.shape[1] :])


def test_one_step_too_many_at_most(make_model, monkeypatch, prompts):
    """The next step is launched before the host looks; not after the last token, and not where the cache is handed out."""
    model = make_model("ME*M-", scale=1.0)
    ids, _ = prompts(1, 6, False, 0)
    text = model.generate(ids, **GREEDY)[0]
    steps, run = [], DecodeStep._run

    def counted(self, *arguments):
        steps.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(DecodeStep, "_run", counted)
    new = int((text[6:] == text[9]).nonzero()[0]) + 1  # tokens up to the first that equals the fourth
    for extra, expected in (({}, new), ({"return_dict_in_generate": True}, new - 1)):
        steps.clear()
        model.generate(ids, eos_token_id=int(text[9]), cache_implementation="static", **GREEDY, **extra)
        assert len(steps) == expected
    steps.clear()
    model.generate(ids, eos_token_id=None, cache_implementation="static", **GREEDY)
    assert len(steps) == 8


@pytest.mark.parametrize("extra", [{}, {"use_mtp": True}], ids=str)
def test_the_returned_cache_continues(extra, make_model, tmp_path, replayed, prompts):
    """It is the caller's: a later call uses another one. It can be copied and saved."""
    model = make_model("ME*M-", scale=1.0, **MTP)
    ids, _ = prompts(1, 6, False, 0)
    options = GREEDY | extra
    first = model.generate(
        ids, cache_implementation="static", max_cache_len=64, return_dict_in_generate=True, **options
    )
    assert isinstance(first.cache, StaticHybridCache)
    assert first.cache.get_seq_length() == first.sequences.shape[1] - 1
    model.generate(ids + 1, cache_implementation="static", **options)
    turn = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], 1)
    expected = model.generate(turn, **GREEDY)
    # What drafts left to be replayed is in the states, so it can be saved.
    save_snapshot(first.cache, tmp_path / "state.safetensors", model)
    loaded = load_snapshot(tmp_path / "state.safetensors", model)
    for cache in (loaded, copy.deepcopy(first.cache), first.cache):
        assert model.generate(turn, cache=cache, **options).equal(expected)


def test_rows_can_be_changed(make_model, replayed, prompts):
    """One prompt, many continuations; recorded steps of the old rows are forgotten."""
    model = make_model("ME*M-", scale=1.0)
    ids, _ = prompts(1, 6, False, 0)
    cache = StaticHybridCache(model.config, 64)
    model.generate(ids, cache=cache, **GREEDY | {"max_new_tokens": 4})
    assert len(cache.graphs) == 1
    cache.batch_repeat_interleave(3)
    assert len(cache.graphs) == 0
    seen = cache.get_seq_length()
    turn = torch.cat([model.generate(ids, **GREEDY)[:, :seen], torch.tensor([[5]])], 1).repeat(3, 1)
    turn[:, -1] = torch.tensor([5, 6, 7])
    assert model.generate(turn, cache=cache, **GREEDY).equal(model.generate(turn, **GREEDY))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[2].keys.shape[0] == 1


def test_another_state_of_the_model_is_recorded_anew(make_model, replayed, prompts):
    """Adapters that come, go and are switched off; weights that change in place need nothing."""
    model = make_model("ME*M-", scale=1.0)
    ids, _ = prompts(1, 6, False, 0)
    options = GREEDY | {"eos_token_id": None}

    def check(call):
        assert call(ids, cache_implementation="static", **options).equal(call(ids, **options))
        return call(ids, **options)

    plain = check(model.generate)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj", "q_proj"], init_lora_weights=False))
    assert not check(adapted.generate).equal(plain)
    with adapted.disable_adapter():
        assert check(adapted.generate).equal(plain)
    assert not check(adapted.generate).equal(plain)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    before = dict(replayed.counts)
    check(adapted.generate)
    assert dict(replayed.counts) == before


def test_why_a_model_is_not_recorded(make_model):
    model = make_model("ME*")
    assert "not on a GPU" in why_not_recorded(model, 1)


def test_idle_caches(make_model, prompts):
    """One for each number of rows, two at most; none after `forget_idle_caches`."""
    model = make_model("ME*", scale=1.0)
    caches = {}
    for rows in (1, 2, 3):
        model.generate(prompts(rows, 4, False, 0)[0], cache_implementation="static", **GREEDY)
        idle = captured_decoding._idle[model]
        assert len(idle) == min(rows, 2)
        caches[rows] = idle[-1][1]
    assert borrow_cache(model, 3, 256) is caches[3]
    assert borrow_cache(model, 2, 257) is not caches[2]  # too small
    forget_idle_caches(model)
    assert borrow_cache(model, 2, 10) is not caches[2]
    copy.deepcopy(model)


def test_idle_caches_under_autocast(make_model, prompts):
    """Keys made there have another dtype: a cache that was filled without it is not for them, nor the other way round."""
    model = make_model("ME*")
    ids, _ = prompts(1, 5, False, 0)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for autocast in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = model.generate(ids, cache_implementation="static", **options)
            assert found.equal(model.generate(ids, **options))


def test_sizes_are_few_and_close():
    sizes = {round_up(n) for n in range(1, 4097)}
    assert len(sizes) == 17 and all(n <= round_up(n) <= max(256, 1.25 * n + 1) for n in range(1, 100_000, 37))


def test_what_does_not_fit_is_refused(make_model, prompts):
    model = make_model("ME*", scale=1.0, **MTP)
    ids, _ = prompts(1, 6, False, 0)
    with pytest.raises(ValueError, match=r"fixed size of 5 tokens.*6 more"):
        model(ids, cache=StaticHybridCache(model.config, 5))
    with pytest.raises(ValueError, match=r"prompt of 6 tokens with 9 new ones.*size 13.*max_cache_len=14"):
        model.generate(ids, cache=StaticHybridCache(model.config, 13), **GREEDY)
    assert model.generate(ids, cache=StaticHybridCache(model.config, 14), **GREEDY).shape == (1, 15)
    with pytest.raises(ValueError, match=r"a last step of 8.*max_cache_len=22"):
        model.generate(ids, cache=StaticHybridCache(model.config, 21), use_mtp=True, **GREEDY)
    assert model.generate(ids, cache=StaticHybridCache(model.config, 22), use_mtp=True, **GREEDY).shape == (1, 15)
    with pytest.raises(ValueError, match="max_cache_len"):
        StaticHybridCache(model.config, 0)
    with pytest.raises(ValueError, match=r"fixed size of 5 tokens, this call brings 6"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=5))


def test_rows_that_drafts_left_apart_are_refused(make_model, prompts):
    model = make_model("ME*M-", seed=1, **MTP)
    ids, mask = prompts(3, 6, True, 1)
    found = model.generate(
        ids, attention_mask=mask, use_mtp=True, cache_implementation="static", return_dict_in_generate=True, **GREEDY
        | {"max_new_tokens": 30, "eos_token_id": list(range(20))},
    )  # fmt: skip
    assert found.cache.slots.ragged
    with pytest.raises(ValueError, match="rows of different lengths"):
        model(ids[:, :1], cache=found.cache)
    with pytest.raises(ValueError, match="one number for all rows"):
        StaticHybridCache(model.config, 8).crop(torch.tensor([-1, 0]))


@pytest.mark.parametrize("options", [{"use_mtp": True}, {"cache_implementation": "static"}], ids=str)
def test_a_model_over_several_gpus_is_refused(options, make_model, prompts):
    model = make_model("ME*", **MTP)
    ids, _ = prompts(1, 5, False, 0)
    model.hf_device_map = {
        "model.embeddings": 0,
        "model.layers": "cuda:0",
        "lm_head": torch.device("cuda", 0),
        "mtp": "cpu",
    }
    model.generate(ids, **GREEDY, **options)
    model.hf_device_map["lm_head"] = 1
    with pytest.raises(ValueError, match="is spread over cuda:0, cuda:1"):
        model.generate(ids, **GREEDY, **options)
    assert model.generate(ids, **GREEDY).shape == (1, 14)


def test_device_hooks_leave_a_cache_where_it_is(make_model, prompts, monkeypatch):
    """accelerate moves what a module is given, unless it is told the name; caches know how to be moved."""
    model = make_model("ME*M", **MTP)
    ids, _ = prompts(1, 5, False, 0)
    expected = model.generate(ids, **GREEDY)
    attach_execution_device_hook(model, "cpu", skip_keys=list(model._skip_keys_device_placement))
    monkeypatch.setattr("accelerate.hooks.send_to_device", lambda given, device, **kwargs: _moved(given, **kwargs))
    for options in ({}, {"cache_implementation": "static"}, {"use_mtp": True}):
        assert model.generate(ids, **GREEDY, **options).equal(expected)


def _moved(given, skip_keys=(), **kwargs):
    for value in given.values() if isinstance(given, dict) else given if isinstance(given, tuple) else ():
        named = isinstance(given, dict) and any(value is given.get(key) for key in skip_keys or ())
        assert named or not isinstance(value, HybridCache), "a cache would be moved"
    return given
