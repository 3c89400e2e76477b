"""The likeliest class of each row of logits."""

from torch import Tensor


def likeliest(logits: Tensor, out: Tensor) -> Tensor:
    """Write the place of the largest logit of each row, the first of equal ones, to `out`, and return it.

    Args:
        logits: (..., classes). What is not a number is larger than any number.
        out: (...) int64.
    """
    return out.copy_(logits.argmax(-1))
