"""Bad input: refused by every backend with the argument's name, before anything is written; the raw ops never crash."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, compiled, rotary_tables, use_backend

COS, SIN = rotary_tables(16, 8)
LONG = torch.tensor([0, 0])
VALUE, TYPE, INDEX = ValueError, TypeError, IndexError
Bad = tuple[dict[str, Any], type[Exception], str]


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use_backend(request.param):
        yield request.param


def base(op: str, flat: bool = False) -> dict[str, Any]:
    """Good arguments of an op."""
    shape = (8, 3, 32) if flat else (2, 4, 3, 32)
    x, k, v = (torch.randn(shape) for _ in range(3))
    tables = {"cos": COS.clone(), "sin": SIN.clone()}
    if op == "kv":
        caches = {name: torch.randn(2, 6, 3, 32) for name in ("k_cache", "v_cache")}
        return {"q": x, "k": k, "v": v, **tables, **caches, "cache_seqlens": torch.tensor([0, 2])}
    cu = {"cu_seqlens": torch.tensor([0, 3, 8])} if flat else {}
    return {"x": x, **tables, **cu} if op == "one" else {"q": x, "k": k, **tables, **cu}


OPS: dict[str, Callable[..., Any]] = {"one": apply_rotary, "qk": apply_rotary_qk, "kv": apply_rotary_kv_append}


def bits(x: Tensor) -> Tensor:
    return x.detach().flatten().clone().view(torch.uint8)


def refused(op: str, arguments: dict[str, Any], error: type[Exception], names: str) -> None:
    """The call raises just this, and every tensor that it was given is bit for bit what it was."""
    tensors = {name: (x, bits(x)) for name, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    with pytest.raises(error, match=names) as caught:
        OPS[op](**arguments)
    assert caught.type is error
    for name, (x, before) in tensors.items():
        assert torch.equal(bits(x), before), f"{name} was written"


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# For (2, 4, 3, 32): what is changed in a good call, the error, and what its message must name. X stands for x or q.
COMMON: dict[str, Bad] = {
    "X of nothing": ({"X": None}, TYPE, "X must be a tensor"),
    "X of a list": ({"X": [1.0]}, TYPE, "X must be a tensor"),
    "X of int64": ({"X": wide(2, 4, 3, 32, dtype=torch.int64)}, TYPE, "X must be float32"),
    "X of complex": ({"X": wide(2, 4, 3, 32, dtype=torch.complex64)}, TYPE, "X must be float32"),
    "X of 0 dimensions": ({"X": torch.tensor(1.0)}, VALUE, "X must"),
    "X of 2 dimensions": ({"X": wide(4, 32)}, VALUE, "X must"),
    "X of 5 dimensions": ({"X": wide(1, 2, 4, 3, 32)}, VALUE, "X must"),
    "narrow heads": ({"X": wide(2, 4, 3, 14)}, VALUE, "rotary_dim must be at most the head_dim of X, 14, not 16"),
    "cos of nothing": ({"cos": None}, TYPE, "cos must be a tensor"),
    "sin of a float": ({"sin": 1.0}, TYPE, "sin must be a tensor"),
    "cos of 0 dimensions": ({"cos": torch.tensor(1.0)}, VALUE, "cos must be"),
    "cos of 1 dimension": ({"cos": wide(8)}, VALUE, "cos must be"),
    "cos of 4 dimensions": ({"cos": COS[None, None]}, VALUE, "cos must be"),
    "cos of int64": ({"cos": COS.long(), "sin": SIN.long()}, TYPE, "cos must be of a floating dtype"),
    "cos of float16": ({"cos": COS.half(), "sin": SIN.half()}, TYPE, "cos must be float32"),
    "cos of float64": ({"cos": COS.double(), "sin": SIN.double()}, TYPE, "cos must be float32"),
    "sin of float16": ({"sin": SIN.half()}, TYPE, "sin must be torch.float32 like cos"),
    "sin of fewer rows": ({"sin": SIN[:7]}, VALUE, "sin must have the shape of cos"),
    "sin of fewer columns": ({"sin": SIN[:, :7]}, VALUE, "sin must have the shape of cos"),
    "tables elsewhere": ({"cos": COS.to("meta"), "sin": SIN.to("meta")}, VALUE, "cos must be on cpu"),
    "sin elsewhere": ({"sin": SIN.to("meta")}, VALUE, "sin must be on cpu"),
    "cos with a gradient": ({"cos": COS.clone().requires_grad_()}, VALUE, "cos and sin must not require a grad"),
    "sin with a gradient": ({"sin": SIN.clone().requires_grad_()}, VALUE, "cos and sin must not require a grad"),
    "layout": ({"layout": "sbhd"}, VALUE, "layout must be one of bshd, bhsd"),
    "layout of a list": ({"layout": ["bshd"]}, VALUE, "layout must be one of"),
    "interleaved": ({"interleaved": "yes"}, TYPE, "interleaved must be True or False"),
    "ids of a list": ({"position_ids": [0, 1, 2, 3]}, TYPE, "position_ids must be a tensor"),
    "ids of float32": ({"position_ids": wide(4)}, TYPE, "position_ids must be int32 or int64"),
    "ids of int16": ({"position_ids": wide(4, dtype=torch.int16)}, TYPE, "position_ids must be int32 or int64"),
    "ids elsewhere": ({"position_ids": torch.arange(4, device="meta")}, VALUE, "position_ids must be on cpu"),
    **{
        f"ids of {shape}": (
            {"position_ids": wide(*shape, dtype=torch.int64)},
            VALUE,
            "position_ids must be of the",
        )
        for shape in ((), (3,), (5,), (2, 3), (3, 4), (4, 2), (1, 2, 4), (2, 4, 1), (0, 4))
    },
    "ids below 0": ({"position_ids": torch.tensor([0, 1, -1, 2])}, INDEX, "position -1 of token"),
    "ids too large": ({"position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 8]])}, INDEX, "position 8 of token"),
    "ids of int32 below 0": ({"position_ids": torch.tensor([3, 2, 1, -5]).int()}, INDEX, "position -5 of token"),
    "ids without end": ({"position_ids": torch.tensor([0, 2**62, 0, 0])}, INDEX, f"position {2**62} of token"),
    "tables too short": ({"cos": COS[:3], "sin": SIN[:3]}, INDEX, "outside the tables"),
    "tables of no row": ({"cos": COS[:0], "sin": SIN[:0]}, INDEX, "outside the tables"),
}
ROTATE: dict[str, Bad] = {
    "ids and offset": ({"position_ids": torch.arange(4), "seqlen_offsets": 1}, VALUE, "seqlen_offsets must be None"),
    "ids and offsets": ({"position_ids": torch.arange(4), "seqlen_offsets": LONG}, VALUE, "seqlen_offsets must be"),
    "offset of 1.5": ({"seqlen_offsets": 1.5}, TYPE, "seqlen_offsets must be an int"),
    "offset of a list": ({"seqlen_offsets": [0, 0]}, TYPE, "seqlen_offsets must be an int"),
    "offsets of float32": ({"seqlen_offsets": wide(2)}, TYPE, "seqlen_offsets must be int32 or int64"),
    "offsets for 3": ({"seqlen_offsets": wide(3, dtype=torch.int64)}, VALUE, "seqlen_offsets must be an int or of"),
    "offsets of 0 dims": ({"seqlen_offsets": torch.tensor(1)}, VALUE, "seqlen_offsets must be an int or of"),
    "offsets elsewhere": ({"seqlen_offsets": LONG.to("meta")}, VALUE, "seqlen_offsets must be on cpu"),
    "offset below 0": ({"seqlen_offsets": -1}, INDEX, "outside the tables"),
    "offset too large": ({"seqlen_offsets": 5}, INDEX, "outside the tables"),
    "offset beyond int64": ({"seqlen_offsets": 2**64}, INDEX, "outside the tables"),
    "offset at int64's end": ({"seqlen_offsets": 2**63 - 1}, INDEX, "outside the tables"),
    "offsets below 0": ({"seqlen_offsets": torch.tensor([0, -1])}, INDEX, "position -1 of token"),
    "offsets too large": ({"seqlen_offsets": torch.tensor([0, 5]).int()}, INDEX, "position 8 of token|position 5"),
    "offsets at int64's end": ({"seqlen_offsets": torch.tensor([0, 2**63 - 1])}, INDEX, "outside the tables"),
    "cu for 4 dimensions": ({"cu_seqlens": torch.tensor([0, 4])}, VALUE, "cu_seqlens must be None"),
    "gathered too short": ({"cos": COS[None, :3], "sin": SIN[None, :3]}, VALUE, "gathered cos must be"),
    "gathered for 3": ({"cos": COS[:4].expand(3, 4, 8), "sin": SIN[:4].expand(3, 4, 8)}, VALUE, "gathered cos must"),
    "gathered, offset": ({"cos": COS[None, :4], "sin": SIN[None, :4], "seqlen_offsets": 1}, VALUE, "already gathered"),
    "gathered, ids": (
        {"cos": COS[None, :4], "sin": SIN[None, :4], "position_ids": torch.arange(4)},
        VALUE,
        "already gathered",
    ),
}
# For (8, 3, 32) with cu_seqlens.
FLAT: dict[str, Bad] = {
    "nothing of positions": ({"cu_seqlens": None}, VALUE, "cu_seqlens or position_ids must be given"),
    "cu of a list": ({"cu_seqlens": [0, 3, 8]}, TYPE, "cu_seqlens must be a tensor"),
    "cu of float32": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, TYPE, "cu_seqlens must be int32 or int64"),
    "cu of 2 dimensions": ({"cu_seqlens": torch.tensor([[0, 8]])}, VALUE, "cu_seqlens must be a contiguous"),
    "cu of 0 dimensions": ({"cu_seqlens": torch.tensor(8)}, VALUE, "cu_seqlens must be a contiguous"),
    "cu of nothing": ({"cu_seqlens": LONG[:0]}, VALUE, "cu_seqlens must be a contiguous"),
    "cu with gaps": ({"cu_seqlens": torch.tensor([0, 9, 8, 9])[::2]}, VALUE, "cu_seqlens must be a contiguous"),
    "cu elsewhere": ({"cu_seqlens": LONG.to("meta")}, VALUE, "cu_seqlens must be on cpu"),
    "cu from 1": ({"cu_seqlens": torch.tensor([1, 8])}, VALUE, "cu_seqlens must start at 0"),
    "cu from -1": ({"cu_seqlens": torch.tensor([-1, 8]).int()}, VALUE, "cu_seqlens must start at 0"),
    "cu that falls": ({"cu_seqlens": torch.tensor([0, 5, 4, 8])}, VALUE, "cu_seqlens must start at 0, never fall"),
    "cu past the end": ({"cu_seqlens": torch.tensor([0, 3, 9])}, VALUE, "cu_seqlens must start at 0, never fall"),
    "long sequence": ({"cos": COS[:4], "sin": SIN[:4]}, INDEX, "position 4 of token"),
    "offsets for 3": ({"seqlen_offsets": wide(3, dtype=torch.int64)}, VALUE, "seqlen_offsets must be an int or of"),
    "offsets too large": ({"seqlen_offsets": torch.tensor([0, 4])}, INDEX, "position 8 of token"),
    "offsets below 0": ({"seqlen_offsets": torch.tensor([-1, 0]).int()}, INDEX, "position -1 of token"),
    "offset too large": ({"seqlen_offsets": 4}, INDEX, "outside the tables"),
    "offset below 0": ({"seqlen_offsets": -1}, INDEX, "outside the tables"),
    "ids of (1, total)": ({"position_ids": torch.arange(8)[None]}, VALUE, "position_ids must be of the shape"),
    "ids of the batch": ({"position_ids": LONG}, VALUE, "position_ids must be of the shape"),
    "ids too large": ({"position_ids": torch.arange(1, 9)}, INDEX, "position 8 of token"),
    "layout bhsd": ({"layout": "bhsd"}, VALUE, "layout must be 'bshd'"),
    "gathered": ({"cos": COS[None], "sin": SIN[None]}, VALUE, "already gathered"),
    "max_seqlen above the tables": ({"max_seqlen": 9}, INDEX, "outside the tables"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("op", ["one", "qk"])
@pytest.mark.parametrize("case", [*COMMON, *ROTATE, *(f"flat: {name}" for name in FLAT)])
def test_rotation_refuses(op: str, case: str, inplace: bool) -> None:
    flat = case.startswith("flat: ")
    change, error, names = FLAT[case[6:]] if flat else {**COMMON, **ROTATE}[case]
    x = "x" if op == "one" else "q"
    change = {x if name == "X" else name: value for name, value in change.items()}
    names = names.replace("X", x) if case in COMMON else names
    refused(op, {**base(op, flat), "inplace": inplace, **change}, error, names)


OVER = torch.randn(2, 1, 4, 3, 64)
NOT_WRITABLE: dict[str, tuple[Tensor, str]] = {
    "expanded heads": (OVER[:, 0, :, :1, :32].expand(2, 4, 3, 32), "must not be an expanded tensor"),
    "expanded batch": (OVER[:1, 0, :, :, :32].expand(2, 4, 3, 32), "must not be an expanded tensor"),
    "last dimension of stride 2": (OVER[:, 0, :, :, ::2], "must have a contiguous last dimension"),
    "last dimension first": (torch.randn(32, 2, 4, 3).permute(1, 2, 3, 0), "must have a contiguous last dimension"),
}


@pytest.mark.parametrize("case", NOT_WRITABLE)
def test_what_cannot_be_written_is_refused(case: str) -> None:
    x, message = NOT_WRITABLE[case]
    refused("one", {**base("one"), "x": x, "inplace": True}, VALUE, f"x {message}")
    refused("qk", {**base("qk"), "q": x, "inplace": True}, VALUE, f"q {message}")
    refused("qk", {**base("qk"), "k": x, "inplace": True}, VALUE, f"k {message}")
    refused("kv", {**base("kv"), "k_cache": x}, VALUE, f"k_cache {message}")
    refused("kv", {**base("kv"), "k_cache": wide(2, 4, 3, 32), "v_cache": x}, VALUE, f"v_cache {message}")


LIKE_Q: dict[str, Bad] = {
    "nothing": ({"Y": None}, TYPE, "Y must be a tensor"),
    "3 dimensions": ({"Y": wide(4, 3, 32)}, VALUE, "Y must have the shape of q"),
    "another batch": ({"Y": wide(1, 4, 3, 32)}, VALUE, "Y must have the shape of q"),
    "another seqlen": ({"Y": wide(2, 5, 3, 32)}, VALUE, "Y must have the shape of q"),
    "another head_dim": ({"Y": wide(2, 4, 3, 64)}, VALUE, "Y must have the shape of q"),
    "another dtype": ({"Y": wide(2, 4, 3, 32, dtype=torch.bfloat16)}, TYPE, "Y must be torch.float32 like q"),
    "another device": ({"Y": wide(2, 4, 3, 32).to("meta")}, VALUE, "Y must be on cpu like q"),
}
KV: dict[str, Bad] = {
    "v of other heads": ({"v": wide(2, 4, 2, 32)}, VALUE, "v must have the shape of k"),
    "gathered": ({"cos": COS[None, :4], "sin": SIN[None, :4]}, VALUE, "cos must be .max_position, rotary_dim / 2."),
    "q of 3 dimensions": ({name: wide(4, 3, 32) for name in "qkv"}, VALUE, "q must"),
    **{
        f"{name} {case}": ({name: cache}, error, f"{name} must")
        for name in ("k_cache", "v_cache")
        for case, cache, error in (
            ("of nothing", None, TYPE),
            ("of 3 dimensions", wide(6, 3, 32), VALUE),
            ("of another batch", wide(1, 6, 3, 32), VALUE),
            ("of other heads", wide(2, 6, 2, 32), VALUE),
            ("of another head_dim", wide(2, 6, 3, 64), VALUE),
            ("of another dtype", wide(2, 6, 3, 32, dtype=torch.float16), TYPE),
            ("elsewhere", wide(2, 6, 3, 32).to("meta"), VALUE),
        )
    },
    "caches of two lengths": ({"v_cache": wide(2, 7, 3, 32)}, VALUE, "v_cache must have the shape of k_cache"),
    "lengths of nothing": ({"cache_seqlens": None}, TYPE, "cache_seqlens must be a tensor"),
    "lengths of an int": ({"cache_seqlens": 0}, TYPE, "cache_seqlens must be a tensor"),
    "lengths of float32": ({"cache_seqlens": wide(2)}, TYPE, "cache_seqlens must be int32 or int64"),
    "lengths of 3": ({"cache_seqlens": wide(3, dtype=torch.int64)}, VALUE, "cache_seqlens must be of the shape"),
    "lengths elsewhere": ({"cache_seqlens": LONG.to("meta")}, VALUE, "cache_seqlens must be on cpu"),
    "full cache": ({"cache_seqlens": torch.tensor([0, 3])}, INDEX, "cache_seqlens.1. is 3, and 4 more tokens do not"),
    "length below 0": ({"cache_seqlens": torch.tensor([-1, 0]), "position_ids": torch.arange(4)}, INDEX, "is -1, and"),
    "length at int64's end": (
        {"cache_seqlens": torch.tensor([2**63 - 5, 0]), "position_ids": torch.arange(4)},
        INDEX,
        "do not fit a cache",
    ),
    "position by length": (
        {"cache_seqlens": torch.tensor([0, 2]), "cos": COS[:5], "sin": SIN[:5]},
        INDEX,
        "outside the tables",
    ),
    "int32, full": ({"cache_seqlens": torch.tensor([4, 0]).int()}, INDEX, "cache_seqlens.0. is 4, and 4 more"),
    **{
        f"{name} with a gradient": ({name: wide(2, 4, 3, 32).requires_grad_()}, VALUE, "not require a")
        for name in "qkv"
    },
    "cache with a gradient": ({"k_cache": wide(2, 6, 3, 32).requires_grad_()}, VALUE, "not require a gradient"),
}


@pytest.mark.parametrize("case", [*COMMON, *KV])
def test_kv_append_refuses(case: str) -> None:
    change, error, names = {**COMMON, **KV}[case]
    change = {"q" if name == "X" else name: value for name, value in change.items()}
    refused("kv", {**base("kv"), **change}, error, names.replace("X", "q") if case in COMMON else names)


@pytest.mark.parametrize("op, name", [("qk", "k"), ("kv", "k"), ("kv", "v")])
@pytest.mark.parametrize("case", LIKE_Q)
def test_what_is_not_like_q_is_refused(case: str, op: str, name: str) -> None:
    change, error, names = LIKE_Q[case]
    refused(op, {**base(op), name: change["Y"]}, error, names.replace("Y", name))
    if op == "qk":
        refused(op, {**base(op), name: change["Y"], "inplace": True}, error, names.replace("Y", name))


# In a process of its own, since what this looks for is a crash.
HOSTILE = """
import itertools, torch, neox_kernels
cos, sin = neox_kernels.rotary_tables(16, 8)
x, used, ids = torch.randn(2, 4, 3, 32), torch.tensor([0, 2]), torch.arange(4)
room = torch.zeros(4, 6, 3, 32)
cache = room[1:3]  # with neighbours that see a write past its ends
good = {
    "rotary": (x, cos, sin, ids, None, None, 0, 0), "rotary_": (x, cos, sin, None, used, None, 0, 0),
    "rotary_qk": (x, x.clone(), cos, sin, None, None, None, 0, 0),
    "rotary_qk_": (x, x.clone(), cos, sin, None, None, None, 0, 0),
    "rotary_kv_append": (cache, cache.clone(), x, x, x, cos, sin, used, ids, 0),
}
bad = [
    torch.tensor(1.0), torch.tensor([]), torch.ones(2, 2, 2, 2, 2), torch.ones(2, 4, 3, 0), torch.zeros(0, 2**61),
    torch.ones(1).expand(2**31, 2**31), torch.zeros(2**40, 0, dtype=torch.int64), torch.tensor([2**63 - 1, -(2**63)]),
    torch.tensor([2**63 - 1, 0]), torch.tensor([2**31 - 1, 0]).int(), x.to_sparse(), x.bool(), x.to(torch.complex64),
    x.half(), x.to("meta"), used.to("meta"), None, "x", 1.5, 2**62, -1, 2**63 - 1, 2**70,
]
for name, arguments in good.items():
    op = getattr(torch.ops.neox_kernels, name).default
    op(*arguments)
    for at, value in itertools.product(range(len(arguments)), bad):
        kept = [(t, t.clone()) for t in (x, cos, sin, used, ids, room)]
        try:
            op(*arguments[:at], value, *arguments[at + 1 :])
        except Exception as error:
            assert str(error), (name, at)
            assert all(torch.equal(t, old) for t, old in kept), ("written in spite of", name, at, error)
        else:
            if isinstance(value, torch.Tensor) and (value.is_meta or value.numel() == 2 and value.abs().max() > 2**30):
                print("served, argument", at, "of", name, "being", value)
print("done")
"""


def test_raw_ops_raise_and_never_crash(backend: str, tmp_path: Path) -> None:
    if backend != "compiled":
        pytest.skip("the raw ops are the compiled ones")
    # not in this folder, which Python would look for the package in
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "done\n", f"{done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
