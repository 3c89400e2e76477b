"""How tokens are chosen from logits, on the device alone, so that a recorded step can end with its tokens.

    scores = processors(logits)
    token = argmax scores                                   the likeliest
    token = argmax softmax(scores) / e,  e ~ Exp(1)         drawn: the class whose exponential clock, of rate p, rings first

The second is how `torch.multinomial` draws one class, with the same numbers of torch's generator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process

from ..kernels_hub.registry import likeliest

# Processors that look at nothing but a row's scores, are set by plain numbers, and never wait for the host.
_SCORES_ALONE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)


def draw(chances: Tensor, out: Tensor | None = None) -> Tensor:
    """One class of each row at random: as `torch.multinomial` would, but the host need not wait to see whether it may.

    Args:
        chances: (..., classes) float32, probabilities or any multiple of them.
        out: (...) int64, written to; by default a new tensor.

    Raises:
        RuntimeError: on a CPU, where a probability is NaN or infinite. A GPU is not asked, since the host would not wait for it.
    """
    clocks = torch.empty_like(chances).exponential_()
    if not chances.is_cuda:
        torch._assert_async(
            chances.sum().isfinite(), "no token can be drawn: scores are all -inf, or hold NaN or infinity"
        )
        clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)  # only there can a number be zero
    if out is None:
        out = torch.empty(chances.shape[:-1], dtype=torch.long, device=chances.device)
    return likeliest(chances / clocks, out)


class Choice:
    """The likeliest token, or one that is drawn, behind processors that look at a row's scores alone.

    Attributes:
        drawn: whether tokens are drawn.
        key: equal for choices that do the same.
    """

    def __init__(self, drawn: bool, processors: Iterable[LogitsProcessor] = ()):
        self.drawn, self._processors = drawn, tuple(processors)
        self.key: Hashable = drawn, *((type(p), *sorted(vars(p).items())) for p in self._processors)

    @classmethod
    def of(cls, drawn: bool, processors: Iterable[LogitsProcessor]) -> Choice | None:
        """None where a processor is not known to look at scores alone, such as one that looks at the text."""
        processors = tuple(processors)
        return cls(drawn, processors) if all(type(p) in _SCORES_ALONE for p in processors) else None

    def scores(self, logits: Tensor) -> Tensor:
        """(batch, n, vocab) -> the same, in float32 where anything is done with them."""
        if not (self.drawn or self._processors):
            return logits
        scores = logits.to(torch.float32).flatten(0, 1)  # processors take rows
        for processor in self._processors:
            scores = processor(None, scores)
        return scores.view_as(logits)

    def choose(self, logits: Tensor, out: Tensor) -> Tensor | None:
        """Choose a token for (batch, n, vocab) logits into out (batch, n) int64; returns what drawn ones were drawn from."""
        scores = self.scores(logits)
        if not self.drawn:
            likeliest(scores, out)
            return None
        chances = scores.softmax(-1)
        draw(chances, out)
        return chances
