"""Drafts of prompt lookup and assistants end before the token that would meet a stopping rule.

transformers looks at the rules behind all tokens that a step keeps, so that a text could go on behind a stop string which lies
inside a draft. Without the token that completes it, that token is the one the model itself adds behind the draft, the last of its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

# transformers cuts what is kept for the first two itself; the third is for drafting.
_CUT_ALREADY = (MaxLengthCriteria, EosTokenCriteria, ConfidenceCriteria)
_rules: ContextVar[StoppingCriteriaList | None] = ContextVar("rules", default=None)


@contextlib.contextmanager
def stopping_at(criteria: StoppingCriteriaList) -> Iterator[None]:
    """While this lasts, drafts end before what meets one of `criteria`."""
    token = _rules.set(StoppingCriteriaList(rule for rule in criteria if type(rule) not in _CUT_ALREADY))
    try:
        yield
    finally:
        _rules.reset(token)


def until_stop(generator: CandidateGenerator) -> CandidateGenerator:
    """The same candidates, cut by the rules in force."""
    rules = _rules.get()
    return _UntilStop(generator, rules) if rules else generator


class _UntilStop(CandidateGenerator):
    def __init__(self, generator: CandidateGenerator, rules: StoppingCriteriaList):
        self.generator, self.rules = generator, rules

    def __getattribute__(self, name: str):
        # Also what the base class defines is the wrapped generator's own.
        if name in ("generator", "rules", "get_candidates") or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As the wrapped generator's: (batch, length + drafts) and, if any, logits (batch, drafts, vocab)."""
        ids, logits = self.generator.get_candidates(input_ids, **kwargs)
        length = input_ids.shape[1]
        for drafts in range(ids.shape[1] - length):
            if bool(self.rules(ids[:, : length + drafts + 1], None).all()):
                return ids[:, : length + drafts], None if logits is None else logits[:, :drafts]
        return ids, logits
