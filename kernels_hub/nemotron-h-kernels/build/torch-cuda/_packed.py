"""Weights in FP8 and NVFP4, read where they are packed: decoding, and the three kernels that multiply by them or unpack them.

    FP8:   w = e4m3(byte) * scale                     one float32 scale a matrix
    NVFP4: w = e2m1(code) * e4m3(byte) * scale        16 codes share an e4m3 byte; of the two codes in a byte the low one is first

Codes become floats by moving their bits into the fields of a float32, which leaves the exponent too small by a constant:
no table, no conversion instruction, the same on every GPU. What is too small is made up for where it costs least. NaN is
not looked for; checkpoints that hold it are refused when they are loaded.

`stream` multiplies single vectors: every program reads a few rows of a matrix as 64-bit words, and the time is that of the
bytes. `tiles` multiplies blocks of vectors on tensor cores; a code times its block's scale has at most six bits, exact in
bfloat16. Both take a stack of matrices and one of them for each vector, or for each block of vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on

# A stored matrix, or a stack of them: bytes (..., out, in) or (..., out, in / 2), block scales as uint8 or None, float32 scales.
Packed = tuple[Tensor, Tensor | None, Tensor]

_STREAM_WORDS = 1024  # 64-bit words in one step of a program: 64 bytes for each of its threads
_FILL = 528  # programs that keep every multiprocessor of the largest GPUs busy, at four each


@triton.jit
def _e4m3(word, AT: tl.constexpr = 0):
    """Byte AT of the four in an int32, a float8_e4m3fn, to float32 times 2^-120: sign to bit 31, the rest to 26..20."""
    return (((word.to(tl.int32) << (24 - 8 * AT)) >> 4) & -2014314496).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(word, AT: tl.constexpr):
    """Code AT of the eight in an int32 to float32 times 2^-126: sign to bit 31, exponent and mantissa to 24..22."""
    return (((word << (28 - 4 * AT)) >> 6) & -2118123520).to(tl.float32, bitcast=True)


@triton.jit
def _stream_kernel(
    x,
    which,
    weight,
    block_scale,
    scale,
    out,
    rows,
    words,
    SHARED: tl.constexpr,
    STACKED: tl.constexpr,
    BITS: tl.constexpr,
    RELU2: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """out[vector] = weight[which[vector]] x[vector // SHARED], R rows of it. `x` and `weight` are seen as 64-bit words."""
    vector = tl.program_id(1).to(tl.int64)
    matrix = tl.load(which + vector) if STACKED else vector * 0
    r = tl.program_id(0) * R + tl.arange(0, R)
    w = tl.arange(0, W)
    WIDE: tl.constexpr = out.dtype.element_ty == tl.float32
    FITS: tl.constexpr = 2 if WIDE else 4  # numbers of x in a word
    CODES: tl.constexpr = 64 // BITS
    x += (vector // SHARED) * words * (CODES // FITS)
    row = ((matrix * rows + r) * words)[:, None]
    inside = (r < rows)[:, None] & (w < words)[None, :]
    following = tl.load(weight + row + w[None, :], mask=inside, other=0)
    following_step = tl.load(block_scale + row + w[None, :], mask=inside, other=0) if BITS == 4 else 0
    total = tl.zeros([R, W], tl.float32)
    for start in range(0, words, W):
        packed, step = following, following_step
        # The next step's loads are on their way while this one's codes are multiplied.
        ahead = start + W + w
        inside = (r < rows)[:, None] & (ahead < words)[None, :]
        following = tl.load(weight + row + ahead[None, :], mask=inside, other=0)
        if BITS == 4:
            following_step = tl.load(block_scale + row + ahead[None, :], mask=inside, other=0)
        here = start + w
        part = tl.zeros([R, W], tl.float32)
        for j in tl.static_range(CODES // FITS):
            numbers = tl.load(x + here * (CODES // FITS) + j, mask=here < words, other=0)
            for i in tl.static_range(FITS):
                if WIDE:
                    number = (numbers >> (32 * i)).to(tl.int32)
                elif i % 2 == 0:
                    number = (numbers >> (16 * i)).to(tl.int32) << 16
                else:
                    number = (numbers >> (16 * i - 16)).to(tl.int32) & -65536
                # Halfway up, so that neither the product with a code nor a large number leaves float32's range.
                number = number.to(tl.float32, bitcast=True) * (2.0**60)
                half = (packed >> (32 * ((j * FITS + i) * BITS // 32))).to(tl.int32)
                if BITS == 4:
                    value = _e2m1(half, (j * FITS + i) % 8)
                else:
                    value = _e4m3(half, (j * FITS + i) % 4)
                part += value * number[None, :]
        if BITS == 4:
            total += part * (_e4m3(step) * (2.0**120))
        else:
            total += part
    y = tl.sum(total, 1) * (2.0 ** (66 if BITS == 4 else 60) * tl.load(scale + matrix))
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    tl.store(out + vector * rows + r, y.to(out.dtype.element_ty), mask=r < rows)


@triton.jit
def _tile(weight, block_scale, row, column, rows, width, BITS: tl.constexpr, C: tl.constexpr):
    """Numbers (len(row), C) from `column` on, without the matrix's scale: float32, exact, in NVFP4 times 2^-8."""
    SHARE: tl.constexpr = 8 // BITS
    byte = column // SHARE + tl.arange(0, C // SHARE)
    inside = (row < rows)[:, None] & (byte < width // SHARE)[None, :]
    packed = tl.load(weight + (row * (width // SHARE))[:, None] + byte[None, :], mask=inside, other=0)
    if BITS == 4:
        block = column // 16 + tl.arange(0, C // 16)
        inside = (row < rows)[:, None] & (block < width // 16)[None, :]
        step = tl.load(block_scale + (row * (width // 16))[:, None] + block[None, :], mask=inside, other=0)
        # Twice, since 2^238 is beyond float32.
        step = (_e4m3(step) * (2.0**120)) * (2.0**118)
        word = packed.to(tl.int32)
        codes = tl.interleave(_e2m1(word, 0), _e2m1(word, 1))
        value = tl.reshape(tl.reshape(codes, [row.shape[0], C // 16, 16]) * step[:, :, None], [row.shape[0], C])
    else:
        value = _e4m3(packed) * (2.0**120)
    return value


@triton.jit
def _tiles_kernel(
    x,
    order,
    block_ends,
    expert_of,
    ends,
    weight,
    block_scale,
    scale,
    out,
    vectors,
    experts,
    rows,
    width,
    depth_each,
    SHARED: tl.constexpr,
    GATHER: tl.constexpr,
    STACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BITS: tl.constexpr,
    RELU2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out[v] = weight[expert of v] x[v], or with the weight transposed, M vectors and N outputs of it.

    Of a stack (STACKED) vectors are sorted by expert and expert e's end at `ends[e]`; block b belongs to `expert_of[b]`. With
    GATHER vector v is row `order[v] // SHARED` of x. Program (., s) sums the s-th stretch of `depth_each` terms into out[s].
    """
    depth, outputs = (rows, width) if TRANSPOSED else (width, rows)
    stripes = tl.cdiv(outputs, N)
    number, n0 = tl.program_id(0) // stripes, (tl.program_id(0) % stripes) * N
    expert = number * 0
    first, last = number * M, vectors
    if STACKED:
        expert = tl.load(expert_of + number).to(tl.int32)
        if expert >= experts:
            return
        before = tl.load(block_ends + expert - 1, mask=expert > 0, other=0)
        first = tl.load(ends + expert - 1, mask=expert > 0, other=0) + (number - before) * M
        last = tl.load(ends + expert)
    v = first + tl.arange(0, M)
    source = v
    if GATHER:
        source = (tl.load(order + v, mask=v < last, other=0) // SHARED).to(tl.int32)
    n = n0 + tl.arange(0, N)
    k = tl.arange(0, K)
    weight += expert.to(tl.int64) * rows * (width * BITS // 8)
    if BITS == 4:
        block_scale += expert.to(tl.int64) * rows * (width // 16)
    x += source.to(tl.int64)[:, None] * depth
    total = tl.zeros([M, N], tl.float32)
    start = tl.program_id(1) * depth_each
    for at in range(start, min(start + depth_each, depth), K):
        a = tl.load(x + (at + k)[None, :], mask=(v < last)[:, None] & (at + k < depth)[None, :], other=0.0)
        if TRANSPOSED:
            b = _tile(weight, block_scale, at + k, n0, rows, width, BITS, N)
        else:
            b = tl.trans(_tile(weight, block_scale, n, at, rows, width, BITS, K))
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    total *= tl.load(scale + expert) * (256.0 if BITS == 4 else 1.0)
    if RELU2:
        total = tl.maximum(total, 0.0)
        total = total * total
    at = (tl.program_id(1).to(tl.int64) * vectors + v) * outputs
    mask = (v < last)[:, None] & (n < outputs)[None, :]
    tl.store(out + at[:, None] + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(parts, out, count, PARTS, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for part in range(0, PARTS):
        total += tl.load(parts + part * count.to(tl.int64) + i, mask=i < count, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _unpack_kernel(weight, block_scale, scale, out, rows, width, BITS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C
    value = _tile(weight, block_scale, r, column, rows, width, BITS, C) * (256.0 if BITS == 4 else 1.0)
    c = column + tl.arange(0, C)
    value = (value * tl.load(scale)).to(out.dtype.element_ty)
    tl.store(out + (r * width)[:, None] + c[None, :], value, mask=(r < rows)[:, None] & (c < width)[None, :])


def shape_of(packed: Packed) -> tuple[int, int, int]:
    """Rows and width of the numbers of a matrix, and the bits of one."""
    codes, block_scale, _ = packed
    bits = 8 if block_scale is None else 4
    return codes.shape[-2], codes.shape[-1] * 8 // bits, bits


def stream(x: Tensor, which: Tensor | None, packed: Packed, shared: int = 1, relu2: bool = False) -> Tensor:
    """Vector times matrix, for few vectors.

    Args:
        x: (vectors / shared, width) contiguous, bfloat16 or float32.
        which: (vectors,) int64, the matrix of each; None for a single matrix.
        shared: how many vectors one after another are the same row of `x`.
        relu2: return relu(...)^2.

    Returns:
        (vectors, rows) in the dtype of x.
    """
    rows, width, bits = shape_of(packed)
    codes, block_scale, scale = packed
    vectors = x.shape[0] * shared if which is None else which.numel()
    out = torch.empty(vectors, rows, dtype=x.dtype, device=x.device)
    if x.storage_offset() * x.element_size() % 16:
        x = x.clone()
    words = width * bits // 64
    height = 16 if rows * vectors >= 16 * _FILL else 8
    if out.numel():
        with on(x):
            _stream_kernel[(triton.cdiv(rows, height), vectors)](
                x.view(torch.int64),
                x if which is None else which,
                codes.view(torch.int64),
                codes if block_scale is None else block_scale,
                scale,
                out,
                rows,
                words,
                shared,
                which is not None,
                bits,
                relu2,
                height,
                min(_STREAM_WORDS // height, triton.next_power_of_2(words)),
                num_warps=4,
            )
    return out


def blocks_of(ends: Tensor, pairs: int, size: int) -> tuple[Tensor, Tensor]:
    """How sorted vectors are cut into blocks of one expert each: where each expert's blocks end, and each block's expert.

    The number of blocks is known to the device alone: there are as many as there could be, and those past the end have no
    expert (the number of experts).
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    block_ends = ((counts + size - 1) // size).cumsum(0).to(torch.int32)
    most = pairs // size + min(pairs, ends.numel())
    numbers = torch.arange(most, dtype=torch.int32, device=ends.device)
    return block_ends, torch.searchsorted(block_ends, numbers, right=True, out_int32=True)


def tiles(
    x: Tensor,
    packed: Packed,
    groups: tuple[Tensor, Tensor, int, int] | None = None,
    gather: bool = False,
    transposed: bool = False,
    relu2: bool = False,
) -> Tensor:
    """Blocks of vectors times matrices.

    Args:
        x: (vectors, depth) contiguous, bfloat16 or float32; with `gather` (vectors / shared, depth).
        groups: of a stack of matrices `order` (vectors,) and `ends` (matrices,) int32, the vectors sorted by matrix, `shared`
            vectors to a row of x before they were sorted, and the size of a block.
        transposed: multiply by the matrix as it is, (vectors, rows) -> (vectors, width), not by its transpose.

    Returns:
        (vectors, outputs) in the dtype of x.
    """
    rows, width, bits = shape_of(packed)
    codes, block_scale, scale = packed
    depth, outputs = (rows, width) if transposed else (width, rows)
    splits, n = 1, 64
    if groups is None:
        vectors, experts, shared, size = x.shape[0], 1, 1, max(16, triton.next_power_of_2(x.shape[0]))
        order = block_ends = expert_of = ends = x  # not looked at
        blocks = 1
        splits = max(1, min(_FILL // triton.cdiv(outputs, n), depth // 512))
    else:
        order, ends, shared, size = groups
        vectors, experts = order.numel(), ends.numel()
        block_ends, expert_of = blocks_of(ends, vectors, size)
        blocks = expert_of.numel()
        # With four warps two programs share a multiprocessor: one unpacks while the other multiplies. Wider than this, or as
        # wide before Hopper or transposed, registers do not suffice.
        hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
        n = 128 if size >= 64 and hopper and not transposed else 64
    k = 64 if size >= 64 or transposed else 128
    depth_each = triton.cdiv(triton.cdiv(depth, k), splits) * k
    splits = triton.cdiv(depth, depth_each)
    out = torch.empty(vectors, outputs, dtype=x.dtype, device=x.device)
    to = out if splits == 1 else torch.empty(splits, vectors, outputs, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    with on(x):
        _tiles_kernel[(blocks * triton.cdiv(outputs, n), splits)](
            x,
            order,
            block_ends,
            expert_of,
            ends,
            codes.view(torch.uint8),
            codes if block_scale is None else block_scale,
            scale,
            to,
            vectors,
            experts,
            rows,
            width,
            depth_each,
            shared,
            gather,
            groups is not None,
            transposed,
            bits,
            relu2,
            size,
            n,
            k,
            num_warps=4,
            num_stages=3,
        )
        if splits > 1:
            _sum_kernel[(triton.cdiv(out.numel(), 1024),)](to, out, out.numel(), splits, 1024, num_warps=4)
    return out


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers of one matrix, (rows, width) in `dtype`, rounded once."""
    rows, width, bits = shape_of(packed)
    codes, block_scale, scale = packed
    out = torch.empty(rows, width, dtype=dtype, device=codes.device)
    if out.numel():
        with on(codes):
            _unpack_kernel[(triton.cdiv(rows, 16), triton.cdiv(width, 256))](
                codes.view(torch.uint8),
                codes if block_scale is None else block_scale,
                scale,
                out,
                rows,
                width,
                bits,
                16,
                256,
                num_warps=4,
            )
    return out
