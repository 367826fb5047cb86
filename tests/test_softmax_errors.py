"""Bad input to the causal softmax: refused by every backend with the argument's name, before anything is written."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from softmax_checks import every, memory, randn
from torch import Tensor

from neox_kernels import causal_softmax, compiled, use_backend

VALUE, TYPE = ValueError, TypeError
Bad = tuple[dict[str, Any], type[Exception], str]


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use_backend(request.param):
        yield request.param


def refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    """The call raises just this, and every tensor that it was given is bit for bit what it was."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    before = {name: (memory(x.detach()), x._version) for name, x in tensors.items()}
    with pytest.raises(error, match=words) as caught:
        causal_softmax(**arguments)
    assert caught.type is error
    for name, x in tensors.items():
        assert torch.equal(memory(x.detach()), before[name][0]) and x._version == before[name][1], f"{name} was written"


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BOOL, I64, F64 = torch.bool, torch.int64, torch.float64

# What is changed in a good call with scores of (2, 3, 4, 5), the error, and how its message begins.
BAD: dict[str, Bad] = {
    "scores of nothing": ({"scores": None}, TYPE, "scores must be a tensor, not NoneType"),
    "scores of a list": ({"scores": [1.0]}, TYPE, "scores must be a tensor, not list"),
    **{
        f"scores of {dtype}": (
            {"scores": zeros(2, 3, 4, 5, dtype=dtype)},
            TYPE,
            f"scores must be float32.* not {dtype}",
        )
        for dtype in (I64, torch.int32, torch.uint8, BOOL, torch.complex64)
    },
    **{
        f"scores of {shape}": ({"scores": zeros(*shape)}, VALUE, r"scores must be .batch, nheads, q_len, k_len., not")
        for shape in ((), (5,), (4, 5), (3, 4, 5), (1, 2, 3, 4, 5))
    },
    **{
        f"{name} of {value!r}": ({name: value}, TYPE, f"{name} must be a float, not {type(value).__name__}")
        for name in ("scale", "dropout_p")
        for value in (None, True, "0.5", [0.5], 1j, torch.tensor(0.5), torch.tensor([0.5]))
    },
    **{
        f"{name} of {value!r}": ({name: value}, TYPE, f"{name} must be True or False, not")
        for name in ("causal", "inplace")
        for value in (None, 2, -1, "yes", "", 0.5, [True])
    },
    **{
        f"dropout_p of {p}": ({"dropout_p": p}, VALUE, f"dropout_p must be between 0 and 1, not {p}")
        for p in (-1e-300, -1, 1 + 2**-52, 2, torch.inf, -torch.inf, torch.nan)
    },
    "padding of a list": ({"key_padding_mask": [[True]]}, TYPE, "key_padding_mask must be a tensor, not list"),
    **{
        f"padding of {dtype}": (
            {"key_padding_mask": zeros(2, 5, dtype=dtype)},
            TYPE,
            f"key_padding_mask must be bool, True for the keys to see, not {dtype}",
        )
        for dtype in (torch.float32, I64, torch.uint8)
    },
    **{
        f"padding of {shape}": (
            {"key_padding_mask": zeros(*shape, dtype=BOOL)},
            VALUE,
            r"key_padding_mask must be .batch, k_len., .2, 5., not \(",
        )
        for shape in ((), (5,), (1, 5), (2, 1), (2, 4), (3, 5), (5, 2), (2, 1, 1, 5))
    },
    "padding elsewhere": (
        {"key_padding_mask": zeros(2, 5, dtype=BOOL, device="meta")},
        VALUE,
        "key_padding_mask must be on cpu like scores, not on meta",
    ),
    "mask of a number": ({"attn_mask": -1.0}, TYPE, "attn_mask must be a tensor, not float"),
    **{
        f"mask of {dtype}": ({"attn_mask": zeros(5, dtype=dtype)}, TYPE, f"attn_mask must be one of.* not {dtype}")
        for dtype in (I64, torch.uint8, torch.complex64, F64)
    },
    **{
        f"mask of {shape}": ({"attn_mask": zeros(*shape)}, VALUE, r"attn_mask must broadcast to .2, 3, 4, 5., which")
        for shape in ((4,), (0,), (5, 1), (4, 4), (2, 4, 5), (3, 3, 4, 5), (2, 3, 4, 0), (1, 1, 1, 1, 5))
    },
    "mask elsewhere": ({"attn_mask": zeros(5, device="meta")}, VALUE, "attn_mask must be on cpu like scores, not on m"),
    "head mask of a list": ({"head_mask": [1.0, 1.0, 1.0]}, TYPE, "head_mask must be a tensor, not list"),
    **{
        f"head mask of {dtype}": ({"head_mask": zeros(3, dtype=dtype)}, TYPE, f"head_mask must be one of.* not {dtype}")
        for dtype in (BOOL, I64, torch.complex64, F64)
    },
    **{
        f"head mask of {shape}": (
            {"head_mask": zeros(*shape)},
            VALUE,
            "head_mask must broadcast to .*, which the shape",
        )
        for shape in ((2,), (4,), (0,), (2, 3), (1, 3), (3, 1), (3, 4, 1), (2, 3, 1, 5), (3, 3, 1, 1), (1, 1, 3, 1, 1))
    },
    "head mask elsewhere": ({"head_mask": zeros(3, device="meta")}, VALUE, "head_mask must be on cpu like scores, not"),
    **{
        f"rng of {value!r}, dropout {p}": ({"rng": value, "dropout_p": p}, error, f"rng must be {words}")
        for p in (0.0, 0.5)
        for value, error, words in (
            (7, TYPE, "a tensor, not int"),
            (zeros(2), VALUE, r"\(2,\) int64 on cpu, a seed and an offset, not \(2\) torch.float32 on cpu"),
            (zeros(2, dtype=torch.int32), VALUE, r"\(2,\) int64 on cpu"),
            (zeros(1, dtype=I64), VALUE, r"\(2,\) int64 on cpu, a seed and an offset, not \(1\)"),
            (zeros(3, dtype=I64), VALUE, r"\(2,\) int64 on cpu"),
            (zeros(1, 2, dtype=I64), VALUE, r"\(2,\) int64 on cpu"),
            (zeros(2, dtype=I64, device="meta"), VALUE, r"\(2,\) int64 on cpu.* on meta"),
        )
    },
    **{
        f"dtype of {dtype!r}": ({"dtype": dtype}, TYPE, "dtype must be None or a floating dtype, not")
        for dtype in (torch.int32, BOOL, torch.complex64, "float32", float, [], 0)
    },
    "dtype of float64": (
        {"dtype": F64},
        TYPE,
        "dtype must be float32, bfloat16 or float16 for scores of torch.float32",
    ),
}


def good() -> dict[str, Any]:
    return {"scores": randn(2, 3, 4, 5), "key_padding_mask": torch.ones(2, 5) > 0, "attn_mask": randn(4, 5)}


@every(case=BAD, inplace=[False, True])
def test_bad_arguments_are_refused(case: str, inplace: bool) -> None:
    change, error, words = BAD[case]
    refused({**good(), "inplace": inplace, **change}, error, words)


@every(case=BAD)
def test_bad_arguments_are_refused_where_a_gradient_is_needed(case: str) -> None:
    change, error, words = BAD[case]
    refused({**good(), "scores": randn(2, 3, 4, 5).requires_grad_(), **change}, error, words)


EXPANDED = "must not be an expanded tensor to be written"
STRIDED = "must have a contiguous last dimension to be written"
NOT_WRITABLE = {
    "expanded heads": (randn(2, 1, 4, 5).expand(2, 3, 4, 5), f"scores {EXPANDED}: its strides are .20, 0, 5, 1."),
    "expanded queries": (randn(2, 3, 1, 5).expand(2, 3, 4, 5), f"scores {EXPANDED}"),
    "expanded keys": (randn(2, 3, 4, 1).expand(2, 3, 4, 5), f"scores {STRIDED}, not the stride 0"),
    "stride 2": (randn(2, 3, 4, 10)[..., ::2], f"scores {STRIDED}, not the stride 2"),
    "transposed": (randn(2, 3, 5, 4).transpose(2, 3), f"scores {STRIDED}, not the stride 4"),
}


@every(case=NOT_WRITABLE)
def test_what_cannot_be_written_is_refused(case: str) -> None:
    scores, words = NOT_WRITABLE[case]
    refused({"scores": scores, "inplace": True}, VALUE, words)


def test_another_dtype_in_place_is_refused(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        words = f"dtype must be None or torch.float32 like scores, which are written, not {dtype}"
        refused({**good(), "inplace": True, "dtype": dtype}, VALUE, words)
    x = randn(2, 3, 4, 5)
    assert causal_softmax(x, inplace=True, dtype=torch.float32) is x


def test_a_forced_backend_that_cannot_serve_raises() -> None:
    x = randn(2, 3, 4, 5)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"causal_softmax .*triton: triton serves GPUs only"):
        causal_softmax(x)
    wide = x.double()
    with use_backend("compiled"), pytest.raises(RuntimeError, match=r"compiled: it does not serve torch.float64"):
        causal_softmax(wide, inplace=True)
    assert torch.equal(wide, x.double())


# In a process of its own, since what this looks for is a crash.
HOSTILE = """
import itertools, torch, neox_kernels
fresh = torch.randn(4, 3, 4, 5)
room = fresh.clone()
x = room[1:3]  # with neighbours that see a write past its ends
padding, mask, heads, rng = torch.ones(2, 5) > 0, torch.randn(4, 5), torch.ones(3), torch.tensor([1, 2])
rest = (1.0, padding, mask, heads, rng, 0.5, 1)
ops = torch.ops.neox_kernels
good = {
    "causal_softmax.default": (x, *rest), "causal_softmax.inference": (x, *rest), "causal_softmax_.default": (x, *rest),
    "causal_softmax_backward.default": (x, x.clone(), 1.0, heads, rng, 0.5, 9),
}
bad = [
    torch.tensor(1.0), torch.tensor([]), torch.ones(2, 2, 2, 2, 2), torch.ones(2, 3, 4, 0), torch.zeros(0, 2**61),
    torch.ones(1).expand(2**31, 2**31), torch.ones(1).expand(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, dtype=torch.float64),
    torch.ones(2, 3, 5, 5), torch.ones(2, 3, 4, 10)[..., ::2], torch.ones(3, 1, 1), torch.ones(1, 1, 1, 6) > 0,
    torch.zeros(2**40, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.arange(4)[::2],
    x.to_sparse(), x.bool(), x.to(torch.complex64), x.half(), x.to("meta"), mask.to("meta"), padding.to("meta"),
    rng.to("meta"), None, "x", [1.0], 1.5, -0.5, float("nan"), float("inf"), 16, 64, 2**62, -1, -(2**63), 2**63 - 1,
    2**70,
]
for name, arguments in good.items():
    packet, overload = name.split(".")
    op = getattr(getattr(ops, packet), overload)
    op(*arguments)
    for at, value in itertools.product(range(len(arguments)), bad):
        room.copy_(fresh)
        kept = [(t, t.clone()) for t in (padding, mask, heads, rng, room)]
        try:
            op(*arguments[:at], value, *arguments[at + 1 :])
        except Exception as error:
            assert str(error), (name, at)
            assert all(torch.equal(t, old) for t, old in kept), ("written in spite of", name, at, error)
        else:
            served = kept if "_." not in name else kept[:-1]
            assert all(torch.equal(t, old) for t, old in served), ("an input was written", name, at, value)
            assert torch.equal(room[::3], kept[-1][1][::3]), ("a neighbour was written", name, at, value)
            if isinstance(value, torch.Tensor) and value.is_meta or at == len(arguments) - 1 and value is not bad[0]:
                print("served, argument", at, "of", name, "being", value)
print("done")
"""


def test_raw_ops_raise_and_never_crash(backend: str, tmp_path: Path) -> None:
    if backend != "compiled":
        pytest.skip("the raw ops are the compiled ones")
    # not in this folder, which Python would look for the package in
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "done\n", f"{done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
