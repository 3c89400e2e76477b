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
from transformers.generation.stopping_criteria import ConfidenceCriteria, StoppingCriteriaList

from .stopping_rules import USUAL

# transformers cuts what is kept for the usual ones itself; the other is for drafting.
_CUT_ALREADY = (*USUAL, ConfidenceCriteria)
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
    """The generator itself, its candidates cut by the rules in force."""
    rules, whole = _rules.get(), generator.get_candidates

    def get_candidates(input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        ids, logits = whole(input_ids, **kwargs)
        length = input_ids.shape[1]
        for drafts in range(ids.shape[1] - length):
            if bool(rules(ids[:, : length + drafts + 1], None).all()):
                return ids[:, : length + drafts], None if logits is None else logits[:, :drafts]
        return ids, logits

    if rules:
        # On the generator, not around it: transformers asks what kind of generator it is.
        generator.get_candidates = get_candidates
    return generator
