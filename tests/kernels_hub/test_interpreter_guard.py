"""The interpreter that the kernels are tested in refuses what lies outside a kernel's arguments."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are not interpreted")


@triton.jit
def _copy_kernel(source, target, count, first, stride, SIZE: tl.constexpr, MASKED: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    if MASKED:
        tl.store(target + i, tl.load(source + i * stride, mask=i < count, other=0.0), mask=i < count)
    else:
        tl.store(target + i, tl.load(source + i * stride))


@triton.jit
def _count_kernel(counts, SIZE: tl.constexpr):
    tl.atomic_add(counts + tl.arange(0, SIZE), 1)


@triton.jit
def _widened_kernel(source, target, shift):
    pairs = (source + shift).to(tl.pointer_type(tl.int32))
    tl.store(target, tl.load(pairs))


def test_inside():
    source, target = torch.arange(20.0), torch.zeros(10)
    _copy_kernel[(1,)](source[1:20:2], target, 10, 0, 2, 16, True)
    assert torch.equal(target, torch.arange(1.0, 20, 2))


# The storage goes on behind every one of these tensors: the process would survive what is refused here.
@pytest.mark.parametrize(
    "source, target, count, first, stride, masked, words",
    [
        (10, 20, 0, 0, 1, False, ["reads", "`source` (10,)", "6 of 16 lanes", "elements 0 to 15 of 10"]),
        (20, 10, 0, 0, 1, False, ["writes", "`target` (10,)", "6 of 16 lanes"]),
        (10, 20, 11, 0, 1, True, ["reads", "`source`", "1 of 11 lanes"]),
        (10, 20, 10, -1, 1, True, ["reads", "`source`", "elements -1 to 9"]),
        (20, 20, 0, 0, 2, False, ["reads", "`source`", "elements 0 to 30 of 20"]),
    ],
)
def test_outside(source, target, count, first, stride, masked, words):
    source, target = (torch.zeros(40)[4 : 4 + n] for n in (source, target))
    with pytest.raises(InterpreterError) as error:
        _copy_kernel[(1,)](source, target, count, first, stride, 16, masked)
    assert all(word in str(error.value) for word in ["_copy_kernel", *words]), error.value


def test_another_argument_is_outside_too():
    both = torch.zeros(32)
    with pytest.raises(InterpreterError, match=r"`source`.* elements 0 to 15 of 10"):
        _copy_kernel[(1,)](both[:10], both[10:26], 0, 0, 1, 16, False)


def test_gaps():
    with pytest.raises(InterpreterError, match=r"`source`.* in the gaps"):
        _copy_kernel[(1,)](torch.zeros(8, 6)[:, :4], torch.zeros(16), 0, 0, 1, 16, False)


def test_atomics():
    counts = torch.zeros(20, dtype=torch.int32)
    _count_kernel[(2,)](counts, 16)
    assert counts.tolist() == [2] * 16 + [0] * 4
    with pytest.raises(InterpreterError, match="updates its argument `counts`"):
        _count_kernel[(1,)](counts[:15], 16)


def test_misaligned_wide_reads():
    source, target = torch.tensor([1, 0, 2, 0], dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
    _widened_kernel[(1,)](source, target, 2)
    assert target.item() == 2
    with pytest.raises(InterpreterError, match="no multiples of 4 bytes"):
        _widened_kernel[(1,)](source, target, 1)
    with pytest.raises(InterpreterError, match="elements 4 to 4 of 4"):
        _widened_kernel[(1,)](source, target, 4)
