"""Weights in FP8 and NVFP4: how they are decoded, multiplied by where they are packed, and unpacked in memory.

    FP8:   w = e4m3(byte) * scale                     one float32 scale a matrix
    NVFP4: w = e2m1(code) * e4m3(byte) * scale        16 codes share an e4m3 byte; of the two codes in a byte the low one is first

Codes become floats by moving their bits into the fields of a wider format, which leaves the exponent too small by a constant:
no table, the same on every GPU. What is too small is made up for where it costs least. NaN is not looked for; checkpoints that
hold it are refused when they are loaded.

Three ways to multiply, by the number of vectors. `stream` takes single ones: instructions, not bytes, are what decoding runs out
of, so two codes share each (assembly; Triton has no pairs of float16). `few` takes up to eight in one pass over the weight and
`tiles` any number, both on tensor cores; a code times its block's scale has at most six bits, exact in bfloat16. `tiles` unpacks
a weight anew for every block of vectors; where these are many, `unpack` does it once, for a product of unpacked weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import finish, two_terms
from ._launch import cdiv, gpu, on, power_of_2
from ._overlap import next_may_begin, overlap, prefetch, previous_done
from ._parts import add_parts, parts_of

# A stored matrix, or a stack of them: bytes (..., out, in) or (..., out, in / 2), block scales as uint8 or None, float32 scales.
Packed = tuple[Tensor, Tensor | None, Tensor]

_FILL = 528  # programs that keep every multiprocessor of the largest GPUs busy, at four each
# What `stream` gives a program: rows of a block, words of a stretch. Measured on an H100: rows of experts in stretches of 64 words,
# each thread with two words of four rows; long rows as they are.
_LONG, _STACKED = (4, 256), (16, 64)
# Programs of `_LONG` that lie on a multiprocessor at once: eight of 64 registers a thread. Codes of rows longer than a stretch
# take 96. A program that finds no room begins when the others have ended, and all wait for it.
_RESIDENT, _REGISTERS, _RESIDENT_CODES = 8, 64, 5
FEW = 8  # vectors that one pass of `few` takes: the least a tensor core does


def _dot_codes_assembly() -> str:
    """$0 = sum of sixteen e2m1 codes in $1 and $2 times 2^-14 times the float16 pairs (0, 4), (1, 5), ... in $3 to $10."""
    lines = [".reg .b32 t, u, sum;", ".reg .b16 low, high;", ".reg .f32 a, b;"]
    for pair in range(8):
        word, place = 1 + pair // 4, pair % 4
        # Of each half: the sign to bit 15, exponent and mantissa to bits 11..9.
        sign = f"shl.b32 u, ${word}, {12 - 4 * place};" if place < 3 else f"mov.b32 u, ${word};"
        rest = f"shl.b32 t, ${word}, {9 - 4 * place};" if place < 3 else f"shr.u32 t, ${word}, 3;"
        lines += [sign, "and.b32 u, u, 0x80008000;", rest, "lop3.b32 t, t, 0x0E000E00, u, 0xEA;"]
        lines.append(f"fma.rn.f16x2 sum, t, ${3 + pair}, sum;" if pair else "mul.rn.f16x2 sum, t, $3;")
    lines += ["mov.b32 {low, high}, sum;", "cvt.f32.f16 a, low;", "cvt.f32.f16 b, high;", "add.f32 $0, a, b;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _dot_bytes_assembly() -> str:
    """$0 = sum of eight e4m3 bytes in $1 and $2 times the float16 pairs (0, 1), (2, 3), ... in $3 to $6."""
    lines = [".reg .b32 t, sum;", ".reg .b16 low, high;", ".reg .f32 a, b;"]
    for pair in range(4):
        if pair % 2 == 0:
            lines.append(f"mov.b32 {{low, high}}, ${1 + pair // 2};")
        lines.append(f"cvt.rn.f16x2.e4m3x2 t, {'high' if pair % 2 else 'low'};")
        lines.append(f"fma.rn.f16x2 sum, t, ${3 + pair}, sum;" if pair else "mul.rn.f16x2 sum, t, $3;")
    lines += ["mov.b32 {low, high}, sum;", "cvt.f32.f16 a, low;", "cvt.f32.f16 b, high;", "add.f32 $0, a, b;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _unpack_codes_assembly() -> str:
    """Four bytes of codes in $4, their block scale's byte four times in $5: low codes to $0 and $1, high ones to $2 and $3.

    Each register holds two bfloat16: code times scale times 2^-8.
    """
    lines = [".reg .b32 a, b, t, u, s, c, none;", "mov.b32 none, 0x80008000;"]
    # The scale, for both halves: its byte lies where a bfloat16 has its exponent, times 2^120, times 2^118.
    lines += ["and.b32 s, $5, 0x00FF00FF;", "shl.b32 s, s, 4;"]
    for power in ("0x7B807B80", "0x7A807A80"):
        lines += [f"mov.b32 c, {power};", "fma.rn.bf16x2 s, s, c, none;"]
    lines += ["prmt.b32 a, $4, 0, 0x1404;", "prmt.b32 b, $4, 0, 0x3424;"]  # each byte on top of a half
    for out, (source, shift) in enumerate([("a", 4), ("b", 4), ("a", 0), ("b", 0)]):
        lines += [f"shl.b32 u, {source}, {shift};", "and.b32 u, u, 0x80008000;", f"shr.u32 t, {source}, {6 - shift};"]
        lines += ["lop3.b32 t, t, 0x01C001C0, u, 0xEA;", f"fma.rn.bf16x2 ${out}, t, s, none;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _unpack_bytes_assembly() -> str:
    """Four e4m3 bytes in $2 to bfloat16 in $0 and $1."""
    lines = [".reg .b32 a, t, u, c, none;", "mov.b32 none, 0x80008000;", "mov.b32 c, 0x7B807B80;"]  # 2^120
    for out, bytes_to_halves in enumerate(("0x1404", "0x3424")):
        lines += [f"prmt.b32 a, $2, 0, {bytes_to_halves};", "and.b32 u, a, 0x80008000;", "shr.u32 t, a, 4;"]
        lines += ["lop3.b32 t, t, 0x07F007F0, u, 0xEA;", f"fma.rn.bf16x2 ${out}, t, c, none;"]
    return "{\n" + "\n".join(lines) + "\n}"


_DOT_CODES, _DOT_BYTES = tl.constexpr(_dot_codes_assembly()), tl.constexpr(_dot_bytes_assembly())
_UNPACK_CODES, _UNPACK_BYTES = tl.constexpr(_unpack_codes_assembly()), tl.constexpr(_unpack_bytes_assembly())
_PAIR = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@triton.jit
def _e4m3(word, AT=0):
    """Byte AT of the four in an int32, a float8_e4m3fn, to float32 times 2^-120: sign to bit 31, the rest to 26..20."""
    return (((word.to(tl.int32) << (24 - 8 * AT)) >> 4) & -2014314496).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(word, AT):
    """Code AT of the eight in an int32 to float32 times 2^-126: sign to bit 31, exponent and mantissa to 24..22."""
    return (((word << (28 - 4 * AT)) >> 6) & -2118123520).to(tl.float32, bitcast=True)


@triton.jit
def _first(pair):
    """The lower half of an int32, a bfloat16, in float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _halves(pair):
    """Two float16 of an int32, in float32."""
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _pair(a, b, ASSEMBLY: tl.constexpr):
    """Two float32 as two float16 in an int32, a in the lower half."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_PAIR, "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    low = a.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (b.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _larger(pair):
    """Of the two bfloat16 in an int32, without its sign."""
    return tl.maximum(tl.abs(_first(pair)), tl.abs(_second(pair)))


@triton.jit
def _largest(a, b, c, d):
    """Of the eight bfloat16 in four int32."""
    return tl.maximum(tl.maximum(_larger(a), _larger(b)), tl.maximum(_larger(c), _larger(d)))


@triton.jit
def _to_power(largest, POWER: tl.constexpr):
    """The power of two that brings `largest` to [2^POWER, 2^(POWER + 1)), if it is no smaller than 2^(POWER - 126), and its inverse."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, (POWER + 1) << 23)
    up = 0x7F000000 - (exponent - (POWER << 23))
    return up.to(tl.float32, bitcast=True), (0x7F000000 - up).to(tl.float32, bitcast=True)


@triton.jit
def _sixteen(x, word, words, ASSEMBLY: tl.constexpr):
    """Numbers 16 word to 16 word + 15 as float16 pairs (0, 4), (1, 5), (2, 6), (3, 7), (8, 12), ..., and what they were divided by.

    Float16 has more bits than bfloat16 but less range: what is 2^27 times smaller than the largest of the sixteen is lost.
    """
    x, mask = x + word * 8, word < words
    a, b = tl.load(x, mask=mask, other=0), tl.load(x + 1, mask=mask, other=0)
    c, d = tl.load(x + 2, mask=mask, other=0), tl.load(x + 3, mask=mask, other=0)
    e, f = tl.load(x + 4, mask=mask, other=0), tl.load(x + 5, mask=mask, other=0)
    g, h = tl.load(x + 6, mask=mask, other=0), tl.load(x + 7, mask=mask, other=0)
    # Times a code, which is at most 6 * 2^-14, eight of them stay far below 65504, and ordinary ones far from the smallest numbers.
    up, down = _to_power(tl.maximum(_largest(a, b, c, d), _largest(e, f, g, h)), 13)
    return (
        _pair(_first(a) * up, _first(c) * up, ASSEMBLY),
        _pair(_second(a) * up, _second(c) * up, ASSEMBLY),
        _pair(_first(b) * up, _first(d) * up, ASSEMBLY),
        _pair(_second(b) * up, _second(d) * up, ASSEMBLY),
        _pair(_first(e) * up, _first(g) * up, ASSEMBLY),
        _pair(_second(e) * up, _second(g) * up, ASSEMBLY),
        _pair(_first(f) * up, _first(h) * up, ASSEMBLY),
        _pair(_second(f) * up, _second(h) * up, ASSEMBLY),
        down,
    )


@triton.jit
def _eight(x, word, words, ASSEMBLY: tl.constexpr):
    """As `_sixteen` for the eight numbers of a word of bytes, in pairs (0, 1), (2, 3), (4, 5), (6, 7)."""
    x, mask = x + word * 4, word < words
    a, b = tl.load(x, mask=mask, other=0), tl.load(x + 1, mask=mask, other=0)
    c, d = tl.load(x + 2, mask=mask, other=0), tl.load(x + 3, mask=mask, other=0)
    up, down = _to_power(_largest(a, b, c, d), 2)  # times 448, four of them
    return (
        _pair(_first(a) * up, _second(a) * up, ASSEMBLY),
        _pair(_first(b) * up, _second(b) * up, ASSEMBLY),
        _pair(_first(c) * up, _second(c) * up, ASSEMBLY),
        _pair(_first(d) * up, _second(d) * up, ASSEMBLY),
        down,
    )


@triton.jit
def _code_times(word, AT: tl.constexpr, pair):
    """Codes AT and AT + 4 of an int32 times 2^-14 times two float16; what one step of `_DOT_CODES` does."""
    low, high = _halves(pair)
    return (_e2m1(word, AT) * low + _e2m1(word, AT + 4) * high) * (2.0**112)


@triton.jit
def _byte_times(word, AT: tl.constexpr, pair):
    low, high = _halves(pair)
    return (_e4m3(word, AT) * low + _e4m3(word, AT + 1) * high) * (2.0**120)


@triton.jit
def _dot_sixteen(packed, step, a, b, c, d, e, f, g, h, down, ASSEMBLY: tl.constexpr):
    """Words of 16 codes (R, W) and their block scales times numbers (W,) of `_sixteen`, times 2^-14."""
    low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    if ASSEMBLY:
        part = tl.inline_asm_elementwise(
            _DOT_CODES,
            "=f,r,r,r,r,r,r,r,r,r,r",
            [
                low,
                high,
                a[None, :],
                b[None, :],
                c[None, :],
                d[None, :],
                e[None, :],
                f[None, :],
                g[None, :],
                h[None, :],
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        part = _code_times(low, 0, a[None, :]) + _code_times(low, 1, b[None, :])
        part += _code_times(low, 2, c[None, :]) + _code_times(low, 3, d[None, :])
        part += _code_times(high, 0, e[None, :]) + _code_times(high, 1, f[None, :])
        part += _code_times(high, 2, g[None, :]) + _code_times(high, 3, h[None, :])
    return part * ((_e4m3(step) * (2.0**120)) * down[None, :])


@triton.jit
def _dot_eight(packed, a, b, c, d, down, ASSEMBLY: tl.constexpr):
    """Words of 8 bytes (R, W) times numbers (W,) of `_eight`."""
    low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    if ASSEMBLY:
        part = tl.inline_asm_elementwise(
            _DOT_BYTES,
            "=f,r,r,r,r,r,r",
            [low, high, a[None, :], b[None, :], c[None, :], d[None, :]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        part = _byte_times(low, 0, a[None, :]) + _byte_times(low, 2, b[None, :])
        part += _byte_times(high, 0, c[None, :]) + _byte_times(high, 2, d[None, :])
    return part * down[None, :]


@triton.jit
def _stream_kernel(
    x,
    which,
    weight,
    block_scale,
    scale,
    out,
    first_term,
    second_term,
    rows,
    word_pairs,
    SHARED: tl.constexpr,
    STACKED: tl.constexpr,
    BITS: tl.constexpr,
    RELU2: tl.constexpr,
    TERMS: tl.constexpr,
    PARTS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    KNOWN: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[vector] = weight[which[vector]] x[vector // SHARED], some blocks of R rows of it, of which each program has an equal share.

    `weight` is seen as 64-bit words, `x` as pairs of bfloat16. Of a row that W words hold, or of one of PARTS of it with a sum for
    each, the numbers of x are made ready once for all blocks; else (PARTS = 0) anew for each stretch of W words. KNOWN: what
    `which` holds was there before the previous kernel began.
    """
    if not KNOWN:
        previous_done(OVERLAP)
    words = word_pairs * 2  # so that the compiler knows two to lie side by side
    vector = tl.program_id(1).to(tl.int64)
    matrix = tl.load(which + vector) if STACKED else vector * 0
    x += (vector // SHARED) * words * (32 // BITS)
    weight += matrix * rows * words
    if BITS == 4:
        block_scale += matrix * rows * words
    w = tl.arange(0, W)
    if PARTS > 1:
        part = tl.program_id(2)
        each = tl.cdiv(word_pairs, PARTS) * 2
        x += part * each * (32 // BITS)
        weight += part * each
        if BITS == 4:
            block_scale += part * each
        out += (vector * PARTS + part) * rows
        count = tl.minimum(each, words - part * each)
    else:
        count = words
        out += vector * rows
    factor = tl.load(scale + matrix) * (16384.0 if BITS == 4 else 1.0)
    all_blocks = tl.cdiv(rows, R)
    first = tl.program_id(0) * all_blocks // tl.num_programs(0)
    blocks = (tl.program_id(0) + 1) * all_blocks // tl.num_programs(0) - first
    r = first * R + tl.arange(0, R)
    at = (r.to(tl.int64) * words)[:, None] + w[None, :]
    inside = (r < rows)[:, None] & (w < count)[None, :]
    following = tl.load(weight + at, mask=inside, other=0)
    following_step = tl.load(block_scale + at, mask=inside, other=0) if BITS == 4 else 0
    if KNOWN:
        previous_done(OVERLAP)
    if PARTS > 0:
        if BITS == 4:
            n0, n1, n2, n3, n4, n5, n6, n7, down = _sixteen(x, w, count, ASSEMBLY)
        else:
            n0, n1, n2, n3, down = _eight(x, w, count, ASSEMBLY)
    # What is multiplied next is on its way while this is multiplied.
    for block in range(0, blocks):
        if PARTS > 0:
            packed, step = following, following_step
            at = ((r + R).to(tl.int64) * words)[:, None] + w[None, :]
            inside = ((r + R < rows) & (block + 1 < blocks))[:, None] & (w < count)[None, :]
            following = tl.load(weight + at, mask=inside, other=0)
            if BITS == 4:
                following_step = tl.load(block_scale + at, mask=inside, other=0)
                total = _dot_sixteen(packed, step, n0, n1, n2, n3, n4, n5, n6, n7, down, ASSEMBLY)
            else:
                total = _dot_eight(packed, n0, n1, n2, n3, down, ASSEMBLY)
        else:
            total = tl.zeros([R, W], tl.float32)
            for start in range(0, words, W):
                if BITS == 4:
                    n0, n1, n2, n3, n4, n5, n6, n7, down = _sixteen(x, start + w, words, ASSEMBLY)
                else:
                    n0, n1, n2, n3, down = _eight(x, start + w, words, ASSEMBLY)
                packed, step = following, following_step
                row_ends = start + W >= words
                ahead = tl.where(row_ends, 0, start + W) + w
                next_r = r + tl.where(row_ends, R, 0)
                at = (next_r.to(tl.int64) * words)[:, None] + ahead[None, :]
                more = (next_r < rows) & ((block + 1 < blocks) | (start + W < words))
                inside = more[:, None] & (ahead < words)[None, :]
                following = tl.load(weight + at, mask=inside, other=0)
                if BITS == 4:
                    following_step = tl.load(block_scale + at, mask=inside, other=0)
                    total += _dot_sixteen(packed, step, n0, n1, n2, n3, n4, n5, n6, n7, down, ASSEMBLY)
                else:
                    total += _dot_eight(packed, n0, n1, n2, n3, down, ASSEMBLY)
        y = finish(tl.sum(total, 1) * factor, first_term, second_term, vector * rows + r, r < rows, RELU2, TERMS)
        tl.store(out + r, y.to(out.dtype.element_ty), mask=r < rows)
        r += R
    next_may_begin(OVERLAP)


@triton.jit
def _few_kernel(
    x,
    weight,
    block_scale,
    scale,
    out,
    first_term,
    second_term,
    vectors,
    rows,
    row_bytes,
    stretch,
    BITS: tl.constexpr,
    RELU2: tl.constexpr,
    TERMS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[v] = weight x[v] for all vectors and N rows; program (., s) sums the s-th `stretch` bytes of each row into out[s].

    The weight is the left operand, so that what a thread unpacks never leaves its registers. Bytes of codes are two operands,
    their low codes and their high ones, which meet the even numbers of x (seen as pairs of bfloat16) and the odd ones.
    """
    n = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.arange(0, M)
    k = tl.arange(0, K)
    total = tl.zeros([N, M], tl.float32)
    start = tl.program_id(1) * stretch
    row = (n.to(tl.int64) * row_bytes)[:, None]
    early = tl.minimum(start + tl.arange(0, 4) * 128, row_bytes - 1)
    prefetch(weight + (tl.minimum(n, rows - 1).to(tl.int64) * row_bytes)[:, None] + early[None, :], OVERLAP)
    previous_done(OVERLAP)
    for at in range(start, min(start + stretch, row_bytes), K):
        inside = (n < rows)[:, None] & (at + k < row_bytes)[None, :]
        packed = tl.load(weight + row + (at + k)[None, :], mask=inside, other=0)
        inside = (v < vectors)[None, :] & (at + k < row_bytes)[:, None]
        numbers = tl.load(x + (v * row_bytes)[None, :] + (at + k)[:, None], mask=inside, other=0)
        if BITS == 4:
            even = numbers.to(tl.int16).to(tl.bfloat16, bitcast=True)
            odd = (numbers >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            block = at // 8 + tl.arange(0, K // 8)
            inside = (n < rows)[:, None] & (block < row_bytes // 8)[None, :]
            steps = (n.to(tl.int64) * (row_bytes // 8))[:, None] + block[None, :]
            step = tl.load(block_scale + steps, mask=inside, other=0)
            step = tl.reshape(tl.broadcast_to(step[:, :, None], [N, K // 8, 8]), [N, K])
            if ASSEMBLY:
                low, high = tl.inline_asm_elementwise(
                    _UNPACK_CODES,
                    "=r,=r,=r,=r,r,r",
                    [packed, step],
                    dtype=(tl.bfloat16, tl.bfloat16),
                    is_pure=True,
                    pack=4,
                )
            else:
                factor = (_e4m3(step) * (2.0**120)) * (2.0**118)
                low = (_e2m1(packed.to(tl.int32), 0) * factor).to(tl.bfloat16)
                high = (_e2m1(packed.to(tl.int32), 1) * factor).to(tl.bfloat16)
            total = tl.dot(low, even, total)
            total = tl.dot(high, odd, total)
        else:
            if ASSEMBLY:
                numeric = tl.inline_asm_elementwise(
                    _UNPACK_BYTES, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
                )
            else:
                numeric = (_e4m3(packed) * (2.0**120)).to(tl.bfloat16)
            total = tl.dot(numeric, numbers, total)
    next_may_begin(OVERLAP)
    total *= tl.load(scale) * (256.0 if BITS == 4 else 1.0)
    out += tl.program_id(1).to(tl.int64) * vectors * rows
    to = (v.to(tl.int64) * rows)[None, :] + n[:, None]
    inside = (v < vectors)[None, :] & (n < rows)[:, None]
    total = finish(total, first_term, second_term, to, inside, RELU2, TERMS)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


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


# Loads of several words together, which multiples of 16 allow, would pass through shared memory to the threads that store.
@triton.jit(do_not_specialize=["words"])
def _unpack_kernel(weight, block_scale, scale, out, words, BITS: tl.constexpr, W: tl.constexpr):
    """The numbers of a matrix's 32-bit `words` to `out`, W words a program; program (., m) has words of matrix m of a stack."""
    NUMBERS: tl.constexpr = 32 // BITS
    matrix = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * W + tl.arange(0, W)
    at, place = matrix * words + w, tl.arange(0, NUMBERS)[None, :]
    packed = tl.load(weight + at, mask=w < words, other=0)[:, None]
    factor = tl.load(scale + matrix) * (256.0 if BITS == 4 else 1.0)
    if BITS == 4:
        step = tl.load(block_scale + at // 2, mask=w < words, other=0)
        value = _e2m1(packed, place) * ((_e4m3(step) * (2.0**120)) * (2.0**118))[:, None]
    else:
        value = _e4m3(packed, place) * (2.0**120)
    to = (at * NUMBERS)[:, None] + place
    tl.store(out + to, (value * factor).to(out.dtype.element_ty), mask=(w < words)[:, None])


def shape_of(packed: Packed) -> tuple[int, int, int]:
    """Rows and width of the numbers of a matrix, and the bits of one."""
    codes, block_scale, _ = packed
    bits = 8 if block_scale is None else 4
    return codes.shape[-2], codes.shape[-1] * 8 // bits, bits


def in_pairs(x: Tensor, *weights: Packed) -> bool:
    """Whether `stream` and `few` serve: they read bfloat16 and 64-bit words of weights two by two."""
    widths = [shape_of(packed) for packed in weights]
    return x.dtype == torch.bfloat16 and all(width * bits % 128 == 0 for _, width, bits in widths)


def _assembly(x: Tensor, bits: int) -> bool:
    """Whether the GPU has the instructions: those for pairs came with 8.0 and the conversion of e4m3 with 8.9. Triton's interpreter has none."""
    return x.is_cuda and (bits == 4 or gpu(x.device)[1] >= (8, 9))


def _aligned(x: Tensor) -> Tensor:
    """x where it may be read in words of 16 bytes."""
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def stream(
    x: Tensor,
    which: Tensor | None,
    packed: Packed,
    shared: int = 1,
    relu2: bool = False,
    plus: tuple[Tensor, ...] = (),
    apart: bool = False,
    known: bool = False,
) -> Tensor:
    """Vector times matrix, each vector for itself.

    Args:
        x: (vectors / shared, width) contiguous, bfloat16.
        which: (vectors,) int64, the matrix of each; None for a single matrix.
        shared: how many vectors one after another are the same row of `x`.
        relu2: return relu(...)^2.
        plus: terms for a single matrix, (vectors, rows) bfloat16; see `_epilogue.py`.
        apart: leave the sums of stretches of a row for the caller to add, which is faster where many vectors meet long rows.
        known: the kernel launched before this one reads `which` too, so that it need not be waited for.

    Returns:
        (vectors, rows) bfloat16; with `apart` (vectors, parts, rows), in float32 if there is more than one part.
    """
    rows, width, bits = shape_of(packed)
    codes, block_scale, scale = packed
    vectors = x.shape[0] * shared if which is None else which.numel()
    words = width * bits // 64
    block_rows, step = _LONG if which is None else _STACKED
    parts = cdiv(words, step) if apart and bits == 4 else int(words <= step)
    wave, registers = _FILL, None
    if which is None:
        slim = bits == 8 or parts == 1
        wave = gpu(x.device)[0] * (_RESIDENT if slim else _RESIDENT_CODES)
        registers = _REGISTERS if slim else None
    out = torch.empty(
        vectors, max(parts, 1), rows, dtype=torch.float32 if parts > 1 else x.dtype, device=x.device
    )  # fmt: skip
    if out.numel():
        x = _aligned(x)
        blocks = cdiv(rows, block_rows)
        # One wave of programs, if the vectors allow it.
        programs = max(1, min(blocks, wave // (vectors * max(parts, 1))))
        with on(x):
            _stream_kernel[(programs, vectors, max(parts, 1))](
                x.view(torch.int32),
                x if which is None else which,
                codes.view(torch.int64),
                codes if block_scale is None else block_scale,
                scale,
                out,
                *two_terms(plus, out),
                rows,
                words // 2,
                shared,
                which is not None,
                bits,
                relu2,
                len(plus),
                parts,
                _assembly(x, bits),
                known or which is None,
                block_rows,
                step,
                num_warps=4,
                maxnreg=registers,
                **overlap(x),
            )
    return out if apart else out.view(vectors, rows)


def _stretches(length: int, step: int, most: int) -> tuple[int, int]:
    """A sum's length cut into about `most` stretches of whole steps (no fewer than one): how long each is, and how many."""
    each = cdiv(cdiv(length, step), max(1, most)) * step
    return each, cdiv(length, each)


def few(x: Tensor, packed: Packed, relu2: bool = False, plus: tuple[Tensor, ...] = ()) -> Tensor:
    """Up to `FEW` vectors times one matrix, which is read once.

    Args:
        x: (vectors, width) contiguous, bfloat16.
        relu2, plus: as in `stream`.

    Returns:
        (vectors, rows) bfloat16.
    """
    rows, width, bits = shape_of(packed)
    codes, block_scale, scale = packed
    vectors, row_bytes, n, k = x.shape[0], width * bits // 8, 32, 128
    out = torch.empty(vectors, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = _aligned(x)
    tiles = cdiv(rows, n)
    stretch, splits = _stretches(row_bytes, k, min(_FILL // tiles, row_bytes // 1024))
    to = parts_of(out, splits)
    with on(x):
        _few_kernel[(tiles, splits)](
            x.view(torch.int32) if bits == 4 else x,
            codes.view(torch.uint8),
            codes if block_scale is None else block_scale,
            scale,
            to,
            *two_terms(plus, out),
            vectors,
            rows,
            row_bytes,
            stretch,
            bits,
            relu2 and splits == 1,
            len(plus) if splits == 1 else 0,
            _assembly(x, bits),
            FEW,
            n,
            k,
            num_warps=2,
            num_stages=4,
            **overlap(x),
        )
        add_parts(to, out, None, relu2, plus)
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
    most, n = 1, 64
    if groups is None:
        vectors, experts, shared, size = x.shape[0], 1, 1, max(16, power_of_2(x.shape[0]))
        order = block_ends = expert_of = ends = x  # not looked at
        blocks = 1
        most = min(_FILL // cdiv(outputs, n), depth // 512)
    else:
        order, ends, shared, size = groups
        vectors, experts = order.numel(), ends.numel()
        block_ends, expert_of = blocks_of(ends, vectors, size)
        blocks = expert_of.numel()
        # With four warps two programs share a multiprocessor: one unpacks while the other multiplies. Wider than this, or as
        # wide before Hopper or transposed, registers do not suffice.
        n = 128 if size >= 64 and gpu(x.device)[1] >= (9, 0) and not transposed else 64
    k = 64 if size >= 64 or transposed else 128
    depth_each, splits = _stretches(depth, k, most)
    out = torch.empty(vectors, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    to = parts_of(out, splits)
    with on(x):
        _tiles_kernel[(blocks * cdiv(outputs, n), splits)](
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
        add_parts(to, out)
    return out


def unpack_into(packed: Packed, out: Tensor) -> Tensor:
    """The numbers of a matrix, or of a stack, to `out` (..., rows, width), contiguous, rounded once to its dtype."""
    codes, block_scale, scale = packed
    rows, width, bits = shape_of(packed)
    words, step = rows * width * bits // 32, 64 * bits
    if out.numel():
        with on(codes):
            _unpack_kernel[(cdiv(words, step), scale.numel())](
                codes.view(torch.int32),
                codes if block_scale is None else block_scale,
                scale,
                out,
                words,
                bits,
                step,
                num_warps=4,
            )
    return out


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix, or of a stack, (..., rows, width) in `dtype`, rounded once."""
    codes = packed[0]
    shape = *codes.shape[:-1], shape_of(packed)[1]
    return unpack_into(packed, torch.empty(shape, dtype=dtype, device=codes.device))
