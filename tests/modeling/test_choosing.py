"""Tokens chosen on the device: drawn as torch draws them, behind processors that look at scores alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.modeling.choosing import Choice, draw
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 5), classes=st.integers(1, 300), few=st.booleans(), seed=st.integers(0, 10**6))
def test_draws_are_those_of_torch(rows, classes, few, seed):
    torch.manual_seed(seed)
    chances = torch.randn(rows, classes).mul(3).softmax(-1)
    if few:
        chances.masked_fill_(chances < chances.amax(-1, keepdim=True), 0.0)
    written = []
    for function in (draw, lambda p: torch.multinomial(p, 1).squeeze(1) if rows else draw(p)):
        torch.manual_seed(seed)
        written.append([*function(chances).tolist(), float(torch.rand(()))])
    assert written[0] == written[1]


def test_a_clock_at_zero_rings_for_no_class_without_a_chance(monkeypatch):
    """A CPU's exponential numbers can be zero."""
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    assert draw(torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])).tolist() == [2, 0]


ALONE = [
    processors.TemperatureLogitsWarper(0.7),
    processors.TopKLogitsWarper(5),
    processors.TopPLogitsWarper(0.8),
    processors.MinPLogitsWarper(0.05),
    processors.TypicalLogitsWarper(0.7),
    processors.EpsilonLogitsWarper(0.01),
    processors.InfNanRemoveLogitsProcessor(),
    processors.LogitNormalization(),
]


@pytest.mark.parametrize("rule", ALONE, ids=lambda rule: type(rule).__name__)
def test_scores_of_several_positions(rule):
    """Each position's are those that transformers works out for it."""
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = Choice(True, [rule, processors.TemperatureLogitsWarper(0.9)]).scores(logits)
    both = LogitsProcessorList([rule, processors.TemperatureLogitsWarper(0.9)])
    for position in range(4):
        assert found[:, position].equal(both(None, logits[:, position].float()))


def test_what_looks_at_the_text_is_not_for_the_device():
    class Mine(processors.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return scores / input_ids.shape[1]

    for rule in (processors.RepetitionPenaltyLogitsProcessor(1.2), processors.EtaLogitsWarper(0.1), Mine(0.7)):
        assert Choice.of(True, [processors.TopKLogitsWarper(5), rule]) is None
    for rule in ALONE:
        assert Choice.of(True, [rule]) is not None


def test_keys_tell_settings_apart():
    def key(*rules, drawn=True):
        return Choice(drawn, rules).key

    warm, cold = processors.TemperatureLogitsWarper(1.5), processors.TemperatureLogitsWarper(0.5)
    few = processors.TopKLogitsWarper(5)
    assert key(warm, few) == key(processors.TemperatureLogitsWarper(1.5), processors.TopKLogitsWarper(5))
    keys = [key(), key(drawn=False), key(warm), key(cold), key(warm, few), key(few, warm), key(few)]
    assert len(set(keys)) == len(keys)
