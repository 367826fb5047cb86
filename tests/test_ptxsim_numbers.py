"""The simulator's arithmetic, instruction by instruction, against NumPy, torch and exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptxsim import Buffer, launch
from ptxsim.numerics import fma
from ptxsim.snippet import snippet

Array = np.ndarray[Any, Any]
REGISTERS = {2: "%h", 4: "%r", 8: "%rd"}
RANDOM = np.random.default_rng(0)


def evaluate(instruction: str, result: type, *operands: Array) -> Array:
    """The instruction, in which $0, $1 ... are the registers of the operands and $d that of the result, by rows."""
    count = len(operands[0])
    output = np.zeros(count, result)
    names = [f"{REGISTERS[x.itemsize]}{10 + i}" for i, x in enumerate(operands)]
    registers = {"$d": f"{REGISTERS[output.itemsize]}19", **{f"${i}": name for i, name in enumerate(names)}}
    lines = f"setp.ge.u32 %p1, %r2, {count}; @%p1 bra END;"
    arrays = [*operands, output]
    for i, (array, name) in enumerate(zip(arrays, [*names, registers["$d"]], strict=True)):
        lines += f"mad.wide.u32 %rd9, %r2, {array.itemsize}, %rd{i};"
        if i < len(operands):
            lines += f"ld.global.b{8 * array.itemsize} {name}, [%rd9];"
    for sign, name in registers.items():
        instruction = instruction.replace(sign, name)
    lines += f"{instruction} st.global.b{8 * output.itemsize} [%rd9], {registers['$d']}; END:"
    addresses = [x.__array_interface__["data"][0] for x in arrays]
    launch(snippet(lines, ["u64"] * len(arrays)), [-(-count // 32)], 32, addresses, list(map(Buffer, arrays)))
    return output


def floats(n: int = 500) -> Array:
    x = (RANDOM.standard_normal(n) * 10.0 ** RANDOM.integers(-6, 6, n)).astype(np.float32)
    x[:8] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1]
    return RANDOM.permutation(x)


def integers(dtype: type, n: int = 500) -> Array:
    info = np.iinfo(dtype)
    x = RANDOM.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    x[:4] = [0, 1, info.min, info.max]
    return RANDOM.permutation(x)


def to_bits(x: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def from_bits(x: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16)).view(dtype).float()


def test_fma_rounds_once() -> None:
    a, b, c = floats(2000), floats(2000), floats(2000)
    near = RANDOM.random(2000) < 0.5  # where the sum almost vanishes, two roundings differ most
    with np.errstate(all="ignore"):
        c = np.where(near, -(a * b), c).astype(np.float32)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    actual = evaluate("fma.rn.f32 $d, $0, $1, $2;", np.float32, a, b, c)
    for x, y, z, result in zip(a, b, c, actual, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if abs(exact) > 3.4e38 or not np.isfinite(result):
            continue
        error = abs(Fraction(float(result)) - exact)
        for neighbour in (np.nextafter(result, np.float32(np.inf)), np.nextafter(result, np.float32(-np.inf))):
            assert not np.isfinite(neighbour) or error <= abs(Fraction(float(neighbour)) - exact)
    halfway = np.float32(1 + 2**-8), np.float32(1 + 2**-7), np.float32(2**-60)
    up = fma(*(np.array([x]) for x in (halfway[0], np.float32(1), halfway[2])), "bf16")
    assert up[0] > halfway[0]  # above the tie between two bfloat16, though no float32 tells


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    x, y = floats(), floats()
    a, b = to_bits(x, dtype), to_bits(y, dtype)
    s, t = from_bits(a, dtype).to(dtype), from_bits(b, dtype).to(dtype)

    def same(actual: Array, expected: torch.Tensor) -> None:
        torch.testing.assert_close(from_bits(actual, dtype), expected.float(), rtol=0, atol=0, equal_nan=True)

    same(evaluate(f"cvt.rn.{name}.f32 $d, $0;", np.uint16, x), torch.from_numpy(x).to(dtype))
    for opcode, expected in {"add": s + t, "sub": s - t, "mul": s * t}.items():
        same(evaluate(f"{opcode}.rn.{name} $d, $0, $1;", np.uint16, a, b), expected)
        packed = a.astype(np.uint32) | (b.astype(np.uint32) << 16)
        other = b.astype(np.uint32) | (a.astype(np.uint32) << 16)
        result = evaluate(f"{opcode}.rn.{name}x2 $d, $0, $1;", np.uint32, packed, other)
        same(result.astype(np.uint16), expected)
    same(
        evaluate(f"fma.rn.{name} $d, $0, $1, $1;", np.uint16, a, b),
        s.double().mul(t.double()).add(t.double()).to(dtype),
    )
    same(evaluate(f"max.NaN.{name} $d, $0, $1;", np.uint16, a, b), torch.maximum(s, t))
    same(evaluate(f"min.{name} $d, $0, $1;", np.uint16, a, b), torch.fmin(s, t))
    both = evaluate(f"cvt.rn.{name}x2.f32 $d, $0, $1;", np.uint32, x, y)
    same((both >> 16).astype(np.uint16), torch.from_numpy(x).to(dtype))
    same(both.astype(np.uint16), torch.from_numpy(y).to(dtype))
    wide = evaluate(f"cvt.f32.{name} $d, $0;", np.float32, a)
    np.testing.assert_array_equal(wide, from_bits(a, dtype).numpy())


FLOAT_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add.f32 $d, $0, $1;": np.add,
    "sub.f32 $d, $0, $1;": np.subtract,
    "mul.f32 $d, $0, $1;": np.multiply,
    "div.rn.f32 $d, $0, $1;": np.divide,
    "div.full.f32 $d, $0, $1;": np.divide,
    "min.f32 $d, $0, $1;": np.fmin,
    "max.f32 $d, $0, $1;": np.fmax,
    "max.NaN.f32 $d, $0, $1;": np.maximum,
    "max.f32 $d, $0, $1, $0;": np.fmax,
    "neg.f32 $d, $0;": lambda a, b: -a,
    "abs.f32 $d, $0;": lambda a, b: np.abs(a),
    "copysign.f32 $d, $0, $1;": lambda a, b: np.copysign(b, a),
    "ex2.approx.f32 $d, $0;": lambda a, b: np.exp2(a.astype(np.float64)).astype(np.float32),
    "lg2.approx.f32 $d, $0;": lambda a, b: np.log2(a.astype(np.float64)).astype(np.float32),
    "rcp.rn.f32 $d, $0;": lambda a, b: 1 / a,
    "sqrt.rn.f32 $d, $0;": lambda a, b: np.sqrt(a),
    "add.ftz.f32 $d, $0, 0f00000000;": lambda a, b: np.where(np.abs(a) < 2.0**-126, np.float32(0), a),
    "add.sat.f32 $d, $0, $1;": lambda a, b: np.clip(np.nan_to_num(a + b, nan=0.0), 0, 1),
    "setp.lt.f32 %p1, $0, $1; selp.f32 $d, $0, $1, %p1;": lambda a, b: np.where(a < b, a, b),
    "setp.ltu.f32 %p1, $0, $1; @%p1 mov.f32 $d, $0; @!%p1 mov.f32 $d, $1;": (
        lambda a, b: np.where((a < b) | np.isnan(a) | np.isnan(b), a, b)
    ),
    "setp.nan.f32 %p1, $0, $1; selp.f32 $d, 0f3F800000, 0f00000000, %p1;": (
        lambda a, b: (np.isnan(a) | np.isnan(b)).astype(np.float32)
    ),
    "cvt.rni.f32.f32 $d, $0;": lambda a, b: np.rint(a),
    "mul.f32x2 %rd6, %rd7, %rd8; mov.b64 {$d, %r30}, %rd6;": np.multiply,
}


@pytest.mark.parametrize("text", FLOAT_FUNCTIONS)
def test_float32(text: str) -> None:
    a, b = floats(), floats()
    whole = text
    if "f32x2" in text:  # a product in each half of a pair; the lower one is looked at
        whole = "mov.b64 %rd7, {$0, $1}; mov.b64 %rd8, {$1, $0};" + text
    with np.errstate(all="ignore"):
        expected = FLOAT_FUNCTIONS[text](a, b)
    np.testing.assert_array_equal(evaluate(whole, np.float32, a, b), expected)


def _divided(a: Array, b: Array) -> Array:
    return np.array([abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)])


INTEGER_FUNCTIONS: dict[str, tuple[type, Callable[[int, int], int]]] = {
    "add.s32 $d, $0, $1;": (np.int32, lambda a, b: a + b),
    "sub.u32 $d, $0, $1;": (np.uint32, lambda a, b: a - b),
    "mul.lo.s32 $d, $0, $1;": (np.int32, lambda a, b: a * b),
    "mul.hi.u32 $d, $0, $1;": (np.uint32, lambda a, b: a * b >> 32),
    "mul.hi.s32 $d, $0, $1;": (np.int32, lambda a, b: a * b >> 32),
    "mul.hi.u64 $d, $0, $1;": (np.uint64, lambda a, b: a * b >> 64),
    "mul.hi.s64 $d, $0, $1;": (np.int64, lambda a, b: a * b >> 64),
    "mad.lo.s64 $d, $0, $1, $1;": (np.int64, lambda a, b: a * b + b),
    "div.u32 $d, $0, $1;": (np.uint32, lambda a, b: a // b),
    "rem.u32 $d, $0, $1;": (np.uint32, lambda a, b: a % b),
    "min.s32 $d, $0, $1;": (np.int32, min),
    "max.u64 $d, $0, $1;": (np.uint64, max),
    "and.b32 $d, $0, $1;": (np.uint32, lambda a, b: a & b),
    "xor.b64 $d, $0, $1;": (np.uint64, lambda a, b: a ^ b),
    "not.b32 $d, $0;": (np.uint32, lambda a, b: ~a),
    "neg.s32 $d, $0;": (np.int32, lambda a, b: -a),
    "shl.b32 $d, $0, 5;": (np.uint32, lambda a, b: a << 5),
    "shr.s32 $d, $0, 31;": (np.int32, lambda a, b: a >> 31),
    "shr.u64 $d, $0, 33;": (np.uint64, lambda a, b: a >> 33),
    "shf.l.wrap.b32 $d, $0, $1, 7;": (np.uint32, lambda a, b: b << 7 | a >> 25),
    "shf.r.clamp.b32 $d, $0, $1, 9;": (np.uint32, lambda a, b: a >> 9 | b << 23),
    "lop3.b32 $d, $0, $1, $0, 0x6a;": (np.uint32, lambda a, b: (a & b) ^ a),
    "prmt.b32 $d, $0, $1, 0x5410;": (np.uint32, lambda a, b: a & 0xFFFF | b << 16),
    "bfe.u32 $d, $0, 4, 8;": (np.uint32, lambda a, b: a >> 4 & 255),
    "bfe.s32 $d, $0, 28, 8;": (np.int32, lambda a, b: a >> 28),
    "bfe.s64 $d, $0, 4, 8;": (np.int64, lambda a, b: ((a >> 4 & 255) ^ 128) - 128),
    "bfi.b32 $d, $0, $1, 8, 4;": (np.uint32, lambda a, b: b & ~0xF00 | (a & 15) << 8),
    "clz.b32 $d, $0;": (np.uint32, lambda a, b: 32 - a.bit_length()),
    "popc.b32 $d, $0;": (np.uint32, lambda a, b: a.bit_count()),
    "brev.b32 $d, $0;": (np.uint32, lambda a, b: int(f"{a:032b}"[::-1], 2)),
    "setp.lt.s32 %p1, $0, $1; selp.b32 $d, $0, $1, %p1;": (np.int32, min),
}


@pytest.mark.parametrize("text", INTEGER_FUNCTIONS)
def test_integers(text: str) -> None:
    dtype, function = INTEGER_FUNCTIONS[text]
    a, b = integers(dtype), integers(dtype)
    if text.startswith(("div", "rem")):
        b[b == 0] = 3
    expected = [function(int(x), int(y)) % (1 << 8 * a.itemsize) for x, y in zip(a, b, strict=True)]
    actual = evaluate(text, dtype, a, b).view(f"u{a.itemsize}")
    assert actual.tolist() == expected


def test_wide_products_and_signed_division() -> None:
    a, b = integers(np.int32), integers(np.int32)
    b[b == 0], a[a == -(2**31)] = 7, 5
    assert np.array_equal(evaluate("mul.wide.s32 $d, $0, $1;", np.int64, a, b), a.astype(np.int64) * b)
    c = integers(np.int64)
    actual = evaluate("mad.wide.s32 $d, $0, $1, $2;", np.int64, a, b, c)
    with np.errstate(over="ignore"):
        assert np.array_equal(actual, a.astype(np.int64) * b + c)
    assert np.array_equal(evaluate("div.s32 $d, $0, $1;", np.int32, a, b), _divided(a, b))
    assert np.array_equal(evaluate("rem.s32 $d, $0, $1;", np.int32, a, b), np.fmod(a, b))


def test_conversions() -> None:
    x, i = floats(), integers(np.int64)
    with np.errstate(all="ignore"):
        clipped = np.nan_to_num(np.clip(np.trunc(x.astype(np.float64)), -(2**31), 2**31 - 1)).astype(np.int32)
    assert np.array_equal(evaluate("cvt.rzi.s32.f32 $d, $0;", np.int32, x), clipped)
    assert np.array_equal(evaluate("cvt.u32.u64 $d, $0;", np.uint32, i), i.astype(np.uint32))
    assert np.array_equal(
        evaluate("cvt.s64.s32 $d, $0;", np.int64, i.astype(np.int32)), i.astype(np.int32).astype(np.int64)
    )
    assert np.array_equal(
        evaluate("cvt.s32.s8 $d, $0;", np.int32, i.astype(np.int32)), i.astype(np.int8).astype(np.int32)
    )
    assert np.array_equal(evaluate("cvt.rn.f32.s64 $d, $0;", np.float32, i), i.astype(np.float32))
    assert np.array_equal(evaluate("cvt.f64.f32 $d, $0;", np.float64, x), x.astype(np.float64), equal_nan=True)
    assert np.array_equal(evaluate("cvt.sat.u32.s64 $d, $0;", np.uint32, i), np.clip(i, 0, 2**32 - 1).astype(np.uint32))


def test_the_lanes_of_a_warp() -> None:
    x = integers(np.uint32, 64)
    rows = x.reshape(2, 32)

    def check(text: str, expected: Array) -> None:
        assert np.array_equal(evaluate(text, np.uint32, x), expected.ravel()), text

    check("shfl.sync.bfly.b32 $d, $0, 5, 31, -1;", rows[:, np.arange(32) ^ 5])
    check("shfl.sync.idx.b32 $d, $0, 3, 31, -1;", np.repeat(rows[:, 3:4], 32, axis=1))
    check("shfl.sync.down.b32 $d, $0, 4, 31, -1;", np.concatenate((rows[:, 4:], rows[:, 28:]), axis=1))
    check("shfl.sync.up.b32 $d|%p2, $0, 1, 0, -1;", np.concatenate((rows[:, :1], rows[:, :-1]), axis=1))
    # Segments of 16 lanes: the upper bits of the last operand but one.
    check("shfl.sync.bfly.b32 $d, $0, 8, 0x101f, -1;", rows[:, np.arange(32) ^ 8])
    check("redux.sync.add.u32 $d, $0, -1;", np.repeat(rows.sum(1, dtype=np.uint32), 32))
    check("redux.sync.max.s32 $d, $0, -1;", np.repeat(rows.view(np.int32).max(1).view(np.uint32), 32))
    ballot = "setp.gt.u32 %p2, $0, 0x7fffffff; vote.sync.ballot.b32 $d, %p2, -1;"
    check(
        ballot,
        np.repeat(((rows >> 31).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32),
    )
    anyone = "setp.eq.u32 %p2, %r0, 7; vote.sync.any.pred %p3, %p2, -1; selp.b32 $d, 1, 0, %p3;"
    check(anyone, np.ones(64, np.uint32))


def test_matrices_through_shared_memory() -> None:
    """stmatrix lays out what ldmatrix reads, transposed or not; and both as the lanes' numbers say."""
    x = integers(np.uint32, 32)
    row = "mov.u32 %r20, array; and.b32 %r21, %r0, 7; mad.lo.u32 %r20, %r21, 16, %r20;"
    for stored, loaded in (("", ""), (".trans", ".trans")):
        text = f"{row} stmatrix.sync.aligned.m8n8.x1{stored}.shared.b16 [%r20], {{$0}}; bar.warp.sync -1;"
        text += f"ldmatrix.sync.aligned.m8n8.x1{loaded}.shared.b16 {{$d}}, [%r20];"
        assert np.array_equal(evaluate(text, np.uint32, x), x)
    transposed = f"{row} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {{$0}};"
    transposed += "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {$d}, [%r20];"
    matrix = x.view(np.uint16).reshape(8, 8)
    assert np.array_equal(evaluate(transposed, np.uint32, x).view(np.uint16).reshape(8, 8), matrix.T)


def test_atomics() -> None:
    x, total = integers(np.uint32, 256), np.zeros(3, np.uint32)
    lines = """
      mad.wide.u32 %rd3, %r2, 4, %rd0; ld.global.u32 %r3, [%rd3];
      atom.global.add.u32 %r4, [%rd1], %r3; red.global.max.u32 [%rd1+4], %r3; st.global.u32 [%rd3], %r4;
      mov.u32 %r5, array; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r5], 0; bar.sync 0;
      atom.shared.inc.u32 %r6, [%r5], 1000; bar.sync 0; ld.shared.u32 %r7, [%r5];
      @%p1 red.global.add.u32 [%rd1+8], %r7;
    """
    before = x.copy()
    launch(snippet(lines), [4], 64, [x.ctypes.data, total.ctypes.data], [Buffer(x), Buffer(total)])
    sums = np.cumsum(before, dtype=np.uint32)
    assert total.tolist() == [int(sums[-1]), int(before.max()), 256]
    assert np.array_equal(x, np.concatenate(([0], sums[:-1])))
    halves = np.array([0x3C003C00], np.uint32)  # 1.0 and 1.0 in float16
    text = "mov.b32 %r3, 0x40003c00; red.global.add.noftz.f16x2 [%rd0], %r3;"
    launch(snippet(text), [1], 4, [halves.ctypes.data, 0], [Buffer(halves)])
    assert halves.view(np.float16).tolist() == [5.0, 9.0]
