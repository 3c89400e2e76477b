"""Routed experts for more than a few tokens and up to some thousands, without gradients.

An expert then has one to hundreds of tokens, and its products take about as long as its weights take to be read. They are read once: a tile of
weights meets all its expert's tokens, or where these are more than a block, those of blocks that run side by side and find the
tile in the cache. Tokens are gathered, and the activation applied, on the way in and out of the first product.

    placed:  for every pair of token and expert its row among the pairs sorted by expert, and blocks of up to M rows
    hidden = relu(up[expert] x[token])^2      (pairs, intermediate), sorted
    y      = down[expert] hidden              (pairs, width), sorted

The number of blocks is known to the device alone, so a fixed number of programs walks over them. Nothing waits for the host, and
pairs of one expert keep the order of their tokens, so that results do not vary from run to run.

Weights come in parts, of some experts each: those of `quantized_experts.py`, whose longer prompts are multiplied here, are packed
and need not all be unpacked at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import block, cdiv, gpu, on

_PAIRS = 512  # pairs that one program counts and places


class Tiling(NamedTuple):
    """How a product is cut, N outputs and K terms a step, and how its programs run."""

    n: int
    k: int
    warps: int
    stages: int
    programs: int  # on a multiprocessor
    flatten: bool  # whether the next tile's loads begin before this one's outputs are written


# Of a product whose rows are gathered: two programs share a multiprocessor, and while one writes its outputs the other reads. Of one
# whose rows lie together: half as many steps, since both operands come as whole tiles, however long.
_UP, _DOWN = Tiling(128, 64, 8, 3, 2, False), Tiling(128, 128, 8, 3, 1, True)
# Mean tokens of an expert up to which few of them have more than 64.
_SHORT = 48


class Placed(NamedTuple):
    """Pairs sorted by expert."""

    place: Tensor  # (pairs,) int64: the sorted row of each pair
    rows: Tensor  # (pairs,) int32: the token of each sorted row
    begins: Tensor  # (experts + 1,) int32: the number of each expert's first block, then of all blocks
    blocks: Tensor  # int32: of each block its expert, first row and the row after its last


@triton.jit
def _count_kernel(index, counts, pairs, E: tl.constexpr, P: tl.constexpr):
    """counts[part, e]: how many of the part's P pairs are of expert e."""
    part = tl.program_id(0)
    i = part * P + tl.arange(0, P)
    expert = tl.load(index + i, mask=i < pairs, other=0).to(tl.int32)
    tl.store(counts + part * E + tl.arange(0, E), tl.histogram(expert, E, mask=i < pairs))


@triton.jit
def _place_kernel(
    index,
    counts,
    place,
    rows,
    begins,
    blocks,
    pairs,
    parts,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    J: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
):
    """Where each pair of a part goes; the program after the last part cuts the sorted rows into blocks.

    Its loops wait for memory, so that several steps load at once, and threads add up what they have before they meet.
    """
    part = tl.program_id(0)
    e = tl.arange(0, E)
    before, total = tl.zeros([S, E], tl.int32), tl.zeros([S, E], tl.int32)
    for start in tl.range(0, parts, S, loop_unroll_factor=4):
        p = start + tl.arange(0, S)
        count = tl.load(counts + p[:, None] * E + e[None, :], mask=(p < parts)[:, None], other=0)
        total += count
        before += tl.where((p < part)[:, None], count, 0)
    before, total = tl.sum(before, 0), tl.sum(total, 0)
    begin = tl.cumsum(total, 0) - total
    if part == parts:
        count = (total + M - 1) // M
        number = tl.cumsum(count, 0) - count
        tl.store(begins + e, number)
        tl.store(begins + E, tl.sum(count, 0))
        for b in range(0, tl.max(count, 0)):
            at = blocks + 3 * (number + b)
            tl.store(at, e, mask=b < count)
            tl.store(at + 1, begin + b * M, mask=b < count)
            tl.store(at + 2, begin + tl.minimum(total, (b + 1) * M), mask=b < count)
    else:
        i = part * P + tl.arange(0, P)
        expert = tl.load(index + i, mask=i < pairs, other=0).to(tl.int32)
        earlier = tl.zeros([P, J], tl.int32)
        for start in tl.range(0, P, J, loop_unroll_factor=4):
            j = part * P + start + tl.arange(0, J)
            other = tl.load(index + j, mask=j < pairs, other=-1).to(tl.int32)
            same = (other[None, :] == expert[:, None]) & (j[None, :] < i[:, None])
            earlier += same.to(tl.int32)
        row = tl.gather(begin + before, expert, 0) + tl.sum(earlier, 1)
        tl.store(place + i, row.to(tl.int64), mask=i < pairs)
        tl.store(rows + row, i // TOP_K, mask=i < pairs)


@triton.jit(do_not_specialize=["first_expert", "end_expert"])
def _product_kernel(
    x,
    rows,
    begins,
    blocks,
    weight,
    out,
    first_expert,
    end_expert,
    outputs,
    depth,
    x_stride,
    GATHER: tl.constexpr,
    RELU2: tl.constexpr,
    EVEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out[row] = weight[expert of row] x[row], with GATHER x[rows[row]], with RELU2 relu(.)^2 of it, for some experts' rows.

    `weight` (experts * outputs, depth), of the experts from `first_expert` to before `end_expert`, and, without GATHER, `x` are
    descriptors. Their tiles may reach into the next expert or the next block's rows, whose products are not stored. EVEN: K
    divides depth.
    """
    stripes = tl.cdiv(outputs, N)
    k = tl.arange(0, K)
    # Stripes of a block run side by side, then the next block, often of the same expert: both find in the cache what they share.
    begin = tl.load(begins + first_expert)
    tiles = (tl.load(begins + end_expert) - begin) * stripes
    blocks += 3 * begin
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        at = blocks + 3 * (tile // stripes)
        expert, first, last = tl.load(at) - first_expert, tl.load(at + 1), tl.load(at + 2)
        n0 = (tile % stripes) * N
        row = first + tl.arange(0, M)
        inside = (row < last)[:, None]
        if GATHER:
            token = tl.load(rows + row, mask=row < last, other=0)
            source = x + token.to(tl.int64)[:, None] * x_stride + k[None, :]
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, depth, K):
            if GATHER:
                if EVEN:
                    a = tl.load(source + start, mask=inside, other=0.0)
                else:
                    a = tl.load(source + start, mask=inside & (start + k < depth)[None, :], other=0.0)
            else:
                a = x.load([first, start])
            total = tl.dot(a, weight.load([expert * outputs + n0, start]).T, total)
        if RELU2:
            total = tl.maximum(total, 0.0)
            total = total * total
        n = n0 + tl.arange(0, N)
        to = out + row.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=inside & (n < outputs)[None, :])


def place_pairs(index: Tensor, experts: int, m: int) -> Placed:
    """Sort the (tokens, top_k) pairs by expert, stable, and cut them into blocks of one expert and up to `m` rows."""
    tokens, top_k = index.shape
    pairs, index = tokens * top_k, index.contiguous()
    parts, padded = cdiv(pairs, _PAIRS), block(experts)
    most = pairs // m + min(pairs, experts)
    place = torch.empty(pairs, dtype=torch.int64, device=index.device)
    sizes = [pairs, padded + 1, 3 * most, parts * padded]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=index.device)
    rows, begins, blocks, counts = memory.split_with_sizes(sizes)
    with on(index):
        _count_kernel[(parts,)](index, counts, pairs, padded, _PAIRS, num_warps=4)
        _place_kernel[(parts + 1,)](
            index, counts, place, rows, begins, blocks, pairs, parts, top_k, padded, _PAIRS, 16, 8, m, num_warps=8
        )
    return Placed(place, rows, begins[: experts + 1], blocks)


def product(
    x: Tensor,
    placed: Placed,
    weights: Iterable[Tensor],
    outputs: int,
    m: int,
    tiling: Tiling,
    gather: bool,
    relu2: bool,
) -> Tensor:
    """Sorted rows times their experts' weights.

    Args:
        x: (pairs, depth), sorted; with `gather` (tokens, depth).
        weights: those of all experts in parts, each (some, outputs, depth), contiguous, and launched with before the next is
            asked for.
        m: rows of a block.

    Returns:
        (pairs, outputs) in the dtype of x.
    """
    pairs, depth = placed.rows.numel(), x.shape[1]
    n, k, warps, stages, programs, flatten = tiling
    out = torch.empty(pairs, outputs, dtype=x.dtype, device=x.device)
    source = x if gather else TensorDescriptor.from_tensor(x, [m, k])
    first = 0
    for weight in weights:
        experts = weight.shape[0]
        tiles = (pairs // m + min(pairs, experts)) * cdiv(outputs, n)  # if all pairs are of these experts
        with on(x):
            _product_kernel[(min(tiles, programs * gpu(x.device)[0]),)](
                source,
                placed.rows,
                placed.begins,
                placed.blocks,
                TensorDescriptor.from_tensor(weight.view(experts * outputs, depth), [n, k]),
                out,
                first,
                first + experts,
                outputs,
                depth,
                x.stride(0),
                gather,
                relu2,
                depth % k == 0,
                flatten,
                m,
                n,
                k,
                num_warps=warps,
                num_stages=stages,
            )
        first += experts
    return out


def rows_of_a_block(tokens: int, top_k: int, experts: int) -> int:
    """About as many as an expert has tokens."""
    return 64 if tokens * top_k <= _SHORT * experts else 128


def serves(x: Tensor, experts: int, *weights: Tensor) -> bool:
    """Whether the kernel can: Hopper or later, bfloat16, rows of a multiple of 16 bytes that begin at such an address."""
    aligned = not any(t.shape[-1] % 8 or t.data_ptr() % 16 for t in (x, *weights))
    return x.dtype == torch.bfloat16 and experts <= 1024 and aligned and gpu(x.device)[1] >= (9, 0)


def grouped_experts(
    x: Tensor, index: Tensor, up: Iterable[Tensor], down: Iterable[Tensor], experts: int, inner: int
) -> tuple[Tensor, Tensor]:
    """Outputs of the chosen experts, each pair's by itself, and where they lie.

    Args:
        x: (tokens, width) bfloat16; at least one token.
        index: (tokens, top_k) int64.
        up: the experts' weights in parts, as `product` takes them: (some, inner, width); `down` (some, width, inner).
        experts: how many there are.
        inner: the width between their products.

    Returns:
        (pairs, width) sorted by expert, and the row of each of the (tokens * top_k) pairs in it.
    """
    m = rows_of_a_block(*index.shape, experts)
    x = x if x.stride(-1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()
    placed = place_pairs(index, experts, m)
    hidden = product(x, placed, up, inner, m, _UP, gather=True, relu2=True)
    return product(hidden, placed, down, x.shape[1], m, _DOWN, gather=False, relu2=False), placed.place
