"""The namespace of the operators: another one for each time that this repository is loaded into a process.

Registering a name a second time takes the operator away from whoever holds the first, and a call of it then ends the process.
The package that carries these kernels and the `kernels` library may well load them both.
"""

import itertools

import torch


def _free_namespace() -> str:
    for number in itertools.count(1):
        name = "nemotron_h_kernels" if number == 1 else f"nemotron_h_kernels_{number}"
        if not hasattr(getattr(torch.ops, name), "rms_norm"):
            return name
    raise AssertionError("the count does not end")


NAMESPACE = _free_namespace()
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """`name` as it is registered."""
    return f"{NAMESPACE}::{name}"
