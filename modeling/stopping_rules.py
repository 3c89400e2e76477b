"""The two usual stopping rules, a length and end-of-sequence tokens, answered on the host from token numbers it has anyway.

Asked as transformers asks them, each would be a few small kernels behind every token.
"""

from __future__ import annotations

from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

USUAL = (MaxLengthCriteria, EosTokenCriteria)


class UsualRules:
    """Both rules as numbers.

    Attributes:
        stops: end-of-sequence tokens.
        longest: the length at which a text ends, prompt included; None without such a rule.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.longest = min(lengths, default=None)
        self.stops = {
            token
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten().tolist()
        }

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> UsualRules | None:
        """The rules, or None where there are others."""
        usual = all(type(criterion) in USUAL for criterion in criteria)
        return cls(criteria) if usual else None

    def met(self, newest: int, length: int) -> bool:
        """Whether a text of `length` tokens ends with its token `newest`."""
        return newest in self.stops or (self.longest is not None and length >= self.longest)
