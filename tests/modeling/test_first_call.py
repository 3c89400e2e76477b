"""What is compiled before a first call or step, on a CPU: which is gone through, how often, and what that leaves alone."""

import contextlib

import pytest
import torch
from nemotron_super import HybridCache, NemotronHForCausalLM, preset
from nemotron_super.kernels_hub import compile_ahead
from nemotron_super.modeling import captured_decoding, first_call, generation_mixin
from nemotron_super.modeling.modeling_nemotron_h import NemotronHModel
from nemotron_super.modeling.static_cache import StaticHybridCache
from nemotron_super.training.load_balancing import RouterLoads
from torch.utils.flop_counter import FlopCounterMode

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
        try:
            yield
        finally:
            monkeypatch.setattr(compile_ahead, "active", lambda: False)

    @contextlib.contextmanager
    def fork(devices, **options):
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


def step(model, **options):
    """Loss and gradients of a step, with a random state that it moves."""
    torch.manual_seed(4)
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    model.train().zero_grad()
    loss = model(ids, **{"labels": ids} | options).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], torch.rand(1)


@pytest.fixture
def steps(model, monkeypatch, gone_through):
    """For each forward call of the backbone, whether it was only gone through; kernels would be compiled by gradients too."""
    calls, forward, grad = [], NemotronHModel.forward, torch.autograd.grad

    def noted(self, *args, **options):
        calls.append("ahead" if compile_ahead.active() else "made")
        return forward(self, *args, **options)

    def gradients(*args, **options):
        calls.append("gradients")
        assert compile_ahead.active() and not torch.is_autocast_enabled("cpu")
        assert not torch.autograd.is_multithreading_enabled()  # threads of their own would launch
        return grad(*args, **options)

    monkeypatch.setattr(NemotronHModel, "forward", noted)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    return calls


GONE_THROUGH = ["ahead", "gradients", "made"]


def test_a_first_step_is_gone_through_and_changes_nothing(model, monkeypatch, steps):
    found = step(model)
    assert steps == GONE_THROUGH
    again = step(model)
    assert steps == [*GONE_THROUGH, "made"]
    assert not torch.is_autocast_enabled("cpu") and torch.autograd.is_multithreading_enabled()
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_of_any_loss_is_gone_through(model, steps):
    model.train()(torch.tensor([[5, 6]])).logits.logsumexp(-1).sum().backward()
    assert steps == GONE_THROUGH
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_of_mixed_precision_is_gone_through(model, steps, enabled):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        ids = torch.tensor([[5, 6, 7]])
        model.train()(ids, labels=ids).loss.backward()
    assert steps == GONE_THROUGH


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_step_is_gone_through_where_it_can_be(model, steps, reentrant):
    plain = step(model)
    del steps[:]
    first_call._gone_through.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step(model)
    assert steps[: len(GONE_THROUGH)] == (["made"] if reentrant else GONE_THROUGH)
    torch.testing.assert_close(found, plain)


def test_adapters_alone_are_gone_through(model, steps):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], lora_dropout=0.5))
    found = step(adapted)
    assert steps == GONE_THROUGH and len(found[1]) == sum(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(found, step(adapted))


def test_loads_of_experts_are_those_of_steps_that_were_made(model, steps):
    loads = RouterLoads(model, coefficient=0.1)
    found = step(model)
    assert steps == GONE_THROUGH
    first, losses = {name: count.clone() for name, count in loads.counts.items()}, len(loads._losses)
    loads.reset()
    loads.take_balance_loss()
    torch.testing.assert_close(step(model), found, rtol=0, atol=0)
    assert losses == len(loads._losses) > 0
    torch.testing.assert_close(loads.counts, first, rtol=0, atol=0)


def hook_a_module(model):
    model.lm_head.register_forward_hook(lambda *args: None)


def hook_a_module_backward(model):
    model.lm_head.register_full_backward_hook(lambda *args: None)


def hook_a_gradient(model):
    model.lm_head.weight.register_hook(lambda grad: grad)


def hook_what_gathers_a_gradient(model):
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda weight: None)


class Sharded(torch.nn.Parameter):
    """As weights of FSDP are tensors of another kind."""


def shard_a_weight(model):
    model.lm_head.weight = Sharded(model.lm_head.weight.data)


@pytest.mark.parametrize(
    "seen_by", [shard_a_weight, hook_a_module, hook_a_module_backward, hook_a_gradient, hook_what_gathers_a_gradient]
)
def test_a_step_that_somebody_would_see_is_made_alone(model, steps, seen_by):
    seen_by(model)
    step(model)
    assert steps == ["made"]


@pytest.mark.parametrize("prompt_learns", [True, False])
def test_without_gradients_of_weights_no_step_is_gone_through_for_them(model, steps, prompt_learns):
    """A prompt alone learns, or what would learn has no part in the step."""
    model.train().requires_grad_(False)
    if not prompt_learns:
        model.model.embeddings.weight.requires_grad_()
    embeds = torch.randn(1, 3, model.config.hidden_size, requires_grad=prompt_learns)
    loss = model(inputs_embeds=embeds, labels=torch.tensor([[5, 6, 7]])).loss
    assert loss.requires_grad == prompt_learns and "gradients" not in steps and steps[-1] == "made"


def test_a_step_that_fills_a_cache_is_made_alone(model, steps):
    cache = HybridCache(model.config)
    model.train()(torch.tensor([[5, 6, 7]]), cache=cache, use_cache=True).logits.sum().backward()
    assert steps == ["made"] and cache.get_seq_length() == 3


def test_a_step_under_a_dispatch_mode_is_made_alone(model, steps):
    with FlopCounterMode(display=False):
        step(model)
    assert steps == ["made"]


def test_evaluations_are_no_steps(model, steps):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model.train()(ids, labels=ids)
    model.eval()(ids, labels=ids).loss.backward()
    assert steps == ["made", "made"]
    step(model)
    assert steps[2:] == GONE_THROUGH


def test_a_step_without_room_for_another_is_made_all_the_same(model, monkeypatch, steps):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.autograd, "grad", full)
    assert step(model)[0] > 0 and steps == ["ahead", "made"]


def test_a_compiled_step_is_left_to_the_compiler(model, steps):
    compiled = torch.compile(model.train(), backend="eager")
    ids = torch.tensor([[5, 6, 7]])
    compiled(ids, labels=ids)
    assert "ahead" not in steps and first_call._STEP not in first_call._gone_through.get(model, ())
