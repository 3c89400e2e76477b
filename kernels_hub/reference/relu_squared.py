"""The activation of Nemotron's MLPs, relu(x)^2."""

from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 of any shape, in the dtype of x."""
    return x.relu().square()
