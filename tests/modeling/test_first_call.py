"""What `generate` compiles before its first call, on a CPU: which call is gone through, how often, and what it leaves alone."""

import contextlib

import pytest
import torch
from nemotron_super import HybridCache, NemotronHForCausalLM, preset
from nemotron_super.kernels_hub import compile_ahead
from nemotron_super.modeling import captured_decoding, first_call, generation_mixin
from nemotron_super.modeling.static_cache import StaticHybridCache

WAYS = {
    "growing": {},
    "fixed size": {"cache_implementation": "static"},
    "sampled": {"cache_implementation": "static", "do_sample": True, "top_k": 7},
    "drafts": {"use_mtp": True, "num_assistant_tokens": 2},
    "drafts, fixed size": {"use_mtp": True, "num_assistant_tokens": 2, "cache_implementation": "static"},
}


@pytest.fixture
def gone_through(monkeypatch):
    """The calls gone through ahead, as if the model lay on a GPU: the shape of each prompt."""
    shapes = []

    @contextlib.contextmanager
    def inside(device):
        monkeypatch.setattr(compile_ahead, "active", lambda: True)
        yield
        monkeypatch.setattr(compile_ahead, "active", lambda: False)

    @contextlib.contextmanager
    def fork(devices):
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)

    monkeypatch.setattr(first_call, "why_not_recorded", lambda model, tokens: None)
    monkeypatch.setattr(compile_ahead, "available", lambda: True)
    monkeypatch.setattr(compile_ahead, "compiling_ahead", inside)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    generate = NemotronHForCausalLM.generate

    def noted(self, inputs, **options):
        if compile_ahead.active():
            shapes.append(tuple(inputs.shape))
        return generate(self, inputs, **options)

    monkeypatch.setattr(NemotronHForCausalLM, "generate", noted)
    return shapes


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return NemotronHForCausalLM(preset("tiny", num_nextn_predict_layers=1, eos_token_id=None)).state_dict()


@pytest.fixture
def model(weights):
    made = NemotronHForCausalLM(preset("tiny", num_nextn_predict_layers=1, eos_token_id=None)).eval()
    made.load_state_dict(weights)
    return made


def ask(model, rows=2, length=9, **options):
    torch.manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (rows, length))
    return model.generate(ids, max_new_tokens=6, pad_token_id=0, **{"do_sample": False} | options)


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_the_same(model, monkeypatch, gone_through, way):
    got = [ask(model, **WAYS[way]) for _ in range(2)]
    assert gone_through == [(2, 9)]
    monkeypatch.setattr(generation_mixin, "compile_first_call", lambda *args: None)
    assert all(torch.equal(ids, ask(model, **WAYS[way])) for ids in got)


def test_each_kind_of_call_once(model, gone_through):
    ask(model)
    ask(model, length=12)
    assert gone_through == [(2, 9)]
    ask(model, rows=1)
    ask(model, use_mtp=True)
    ask(model, cache_implementation="static")
    ask(model, do_sample=True)
    assert gone_through == [(2, 9), (1, 9), (2, 9), (2, 9), (2, 9)]


def test_of_a_long_prompt_the_beginning(model, monkeypatch, gone_through):
    monkeypatch.setattr(first_call, "_LONGEST_PROMPT", 5)
    ask(model)
    assert gone_through == [(2, 5)]


def test_caches_are_left_alone(model, gone_through):
    ask(model, cache_implementation="static")
    (idle,) = captured_decoding._idle[model]
    ask(model, rows=1, cache_implementation="static")
    assert len(gone_through) == 2
    assert captured_decoding._idle[model][0] is idle and len(captured_decoding._idle[model]) == 2
    mine = StaticHybridCache(model.config, 64)
    ask(model, rows=3, cache=mine)
    assert len(gone_through) == 3 and mine.get_seq_length() == 9 + 6 - 1


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_prompt_that_a_cache_begins_the_rest(model, gone_through, whole):
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    cache = HybridCache(model.config)
    model(ids[:, :6], cache=cache, use_cache=True)
    model.generate(
        ids if whole else ids[:, 6:], attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=2, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert gone_through == [(2, 3)] and cache.get_seq_length() == 9 + 2 - 1


def test_without_room_the_call_is_made_all_the_same(model, monkeypatch, gone_through):
    @contextlib.contextmanager
    def full(device):
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(compile_ahead, "compiling_ahead", full)
    assert ask(model).shape == (2, 15)


def test_nothing_is_gone_through_without_a_gpu(model, monkeypatch):
    monkeypatch.setattr(compile_ahead, "compiling_ahead", None)
    monkeypatch.setattr(compile_ahead, "available", lambda: True)
    ask(model, cache_implementation="static")


def test_nothing_is_gone_through_without_triton(model, monkeypatch, gone_through):
    monkeypatch.setattr(compile_ahead, "available", lambda: False)
    ask(model)
    assert not gone_through


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_the_calls_that_were_made(model, gone_through, register):
    seen = []
    handle = getattr(model.model.layers[0], register)(lambda module, args, *output: seen.append(args))
    ask(model)
    assert not gone_through and len(seen) == 6
    handle.remove()
    ask(model)
    assert gone_through == [(2, 9)]
