"""Functions that compilers see as one operator, and that run as plain functions where nothing watches.

The dispatcher's way to an operator written in Python, and to its gradient, costs the host more time than many a kernel takes.
So a call goes that way only where something has to see the operator: a compiler or an export, a transform of `torch.func`, a
dispatch mode (fake tensors, counters, selective checkpointing). Otherwise the function is called itself; where gradients are
enabled through an autograd function made of the backward that the operator has too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops


def watched() -> bool:
    """Whether something has to see operators instead of what they do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


class Operator:
    """A function of positional arguments, registered with `torch.library`; made by `operator`."""

    def __init__(self, name: str, function: Callable, mutates_args: tuple[str, ...]):
        self._function = function
        qualified = add_op_namespace_prefix(name)
        self._definition = torch.library.custom_op(qualified, function, mutates_args=mutates_args)
        self._operator = getattr(ops, name).default
        # Without a backward, the operator is what refuses one by its name.
        self._with_gradient: Callable = self._operator

    def register_fake(self, fake: Callable) -> Callable:
        """`fake` gives the outputs' shapes and dtypes."""
        return self._definition.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """As of `torch.library`: `setup_context(ctx, inputs, output)`, and `backward(ctx, *grads)` with a gradient an input."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx, *args):
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._with_gradient = type(function.__name__, (torch.autograd.Function,), methods).apply

    def __call__(self, *args: Any) -> Any:
        if watched():
            return self._operator(*args)
        return self._with_gradient(*args) if torch.is_grad_enabled() else self._function(*args)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Decorator: the function below becomes the operator `name`; `mutates_args` names what it writes in place."""
    return lambda function: Operator(name, function, mutates_args)
