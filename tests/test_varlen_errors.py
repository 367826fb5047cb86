"""Bad input to unpad and pad: refused by every backend with the argument's name; the raw ops never crash."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import (
    VarlenMetadata,
    compiled,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    use_backend,
    varlen_metadata,
)

VALUE, TYPE, INDEX = ValueError, TypeError, IndexError
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])
METADATA = varlen_metadata(MASK)
X, Y = torch.randn(2, 3, 4), torch.randn(4, 5)


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use_backend(request.param):
        yield request.param


def replaced(**values: Any) -> VarlenMetadata:
    return METADATA._replace(**values)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


Bad = tuple[Callable[[], Any], type[Exception], str]
BAD: dict[str, Bad] = {
    "mask of a list": (lambda: varlen_metadata([[1]]), TYPE, "attention_mask must be a tensor, not list"),  # type: ignore[arg-type]
    "mask of complex": (lambda: varlen_metadata(MASK + 0j), TYPE, "attention_mask must be bool.* not torch.complex64"),
    "mask of float8": (lambda: varlen_metadata(MASK.float().to(torch.float8_e4m3fn)), TYPE, "attention_mask must be b"),
    "mask of 1 dimension": (lambda: varlen_metadata(MASK[0]), VALUE, r"\(batch, seqlen\), not of the shape \(3\)"),
    "mask of 4 dimensions": (lambda: varlen_metadata(MASK[:, None, None]), VALUE, r"not of the shape \(2, 1, 1, 3\)"),
    "mask of 2**31 tokens": (
        lambda: varlen_metadata(torch.ones(1, dtype=torch.bool).expand(2**16, 2**15)),
        VALUE,
        r"fewer than 2\*\*31 tokens .*, not 2147483648",
    ),
    "2 in a mask": (lambda: varlen_metadata(MASK * 2), VALUE, r"must hold only 0 and 1, not 2 \(at \[0, 0\]\)"),
    "-1 in a mask": (lambda: varlen_metadata(MASK - 1), VALUE, r"must hold only 0 and 1, not -1 \(at \[0, 1\]\)"),
    "256 in a mask": (lambda: varlen_metadata(MASK.short() * 256), VALUE, "must hold only 0 and 1, not 256"),
    "a half in a mask": (lambda: varlen_metadata(MASK.half() / 2), VALUE, "must hold only 0 and 1, not 0.5"),
    "additive mask": (lambda: varlen_metadata((1.0 - MASK) * -1e9), VALUE, "must hold only 0 and 1, not -1000000000"),
    "nan in a mask": (lambda: varlen_metadata(MASK.double() * torch.nan), VALUE, "must hold only 0 and 1, not nan"),
    "capacity of a float": (lambda: varlen_metadata(MASK, capacity=4.0), TYPE, "capacity must be an int, not float"),  # type: ignore[arg-type]
    "capacity of True": (lambda: varlen_metadata(MASK, capacity=True), TYPE, "capacity must be an int, not bool"),
    "negative capacity": (lambda: varlen_metadata(MASK, capacity=-1), VALUE, "capacity must not be negative, not -1"),
    "small capacity": (lambda: varlen_metadata(MASK, capacity=3), VALUE, "capacity must be at least 4, .* not 3"),
    "small capacity, no sync": (lambda: varlen_metadata(MASK, capacity=3, max_seqlen=3), VALUE, "capacity must be at"),
    "max_seqlen of a tensor": (lambda: varlen_metadata(MASK, max_seqlen=ints(3)), TYPE, "max_seqlen must be an int"),  # type: ignore[arg-type]
    "negative max_seqlen": (lambda: varlen_metadata(MASK, max_seqlen=-3), VALUE, "max_seqlen must not be negative"),
    "small max_seqlen": (lambda: varlen_metadata(MASK, max_seqlen=1), VALUE, "max_seqlen must be at least 2, .* not 1"),
    "unpad a number": (lambda: unpad_input(1.0, METADATA), TYPE, "tensors must be a tensor, or a tuple or list"),  # type: ignore[call-overload]
    "unpad None": (lambda: unpad_input((X, None), METADATA), TYPE, r"tensors\[1\] must be a tensor, not NoneType"),  # type: ignore[list-item]
    "unpad nothing": (lambda: unpad_input((), METADATA), VALUE, "tensors must have at least one tensor"),
    "unpad by a mask": (lambda: unpad_input(X, MASK), TYPE, "metadata must be what varlen_metadata returns, not Ten"),  # type: ignore[call-overload]
    "unpad by a tuple": (lambda: unpad_input(X, tuple(METADATA)), TYPE, "metadata must be what .* not tuple"),  # type: ignore[call-overload]
    "unpad 1 dimension": (lambda: unpad_input(X[0, 0], METADATA), VALUE, "tensors must be .batch, seqlen, ....* .4."),
    "unpad another batch": (lambda: unpad_input(X[:1], METADATA), VALUE, r"\(2, 3\), not of the shape \(1, 3, 4\)"),
    "unpad another seqlen": (lambda: unpad_input([X, X[:, :2]], METADATA), VALUE, r"tensors\[1\] must be .* \(2, 2, 4"),
    "unpad elsewhere": (lambda: unpad_input(X.to("meta"), METADATA), VALUE, "tensors must be on cpu like metadata"),
    "pad another total": (
        lambda: pad_input(Y[:3], METADATA),
        VALUE,
        r"total of metadata, 4, not of .* \(3, 5\)",
    ),
    "pad a scalar": (lambda: pad_input(torch.tensor(1.0), METADATA), VALUE, r"tensors must be \(total, ...\)"),
    "pad elsewhere": (lambda: pad_input([Y, Y.to("meta")], METADATA), VALUE, r"tensors\[1\] must be on cpu"),
    "index above": (lambda: unpad_input(X, replaced(indices=ints(0, 6))), INDEX, "between -1 and 5, not 6 .at .1.."),
    "index below": (lambda: unpad_input(X, replaced(indices=ints(-2, 6))), INDEX, "metadata.indices .*, not -2"),
    "indices of int16": (lambda: unpad_input(X, replaced(indices=ints(0).short())), TYPE, "indices must be int32 or"),
    "indices of 2 dimensions": (lambda: unpad_input(X, replaced(indices=MASK)), VALUE, r"indices must be \(total,\)"),
    "inverse above": (lambda: pad_input(Y, replaced(inverse=MASK * 4)), INDEX, "metadata.inverse .* -1 and 3, not 4"),
    "inverse below": (lambda: pad_input(Y, replaced(inverse=-2 * MASK)), INDEX, "metadata.inverse .* not -2"),
    "inverse of float32": (
        lambda: pad_input(Y, replaced(inverse=X[..., 0])),
        TYPE,
        "metadata.inverse must be int",
    ),
    "inverse of 1 dimension": (
        lambda: unpad_input(X, replaced(inverse=MASK[0])),
        VALUE,
        "metadata.inverse must be",
    ),
    "first axis of a list": (lambda: index_first_axis([1], ints(0)), TYPE, "x must be a tensor"),  # type: ignore[arg-type]
    "first axis of a scalar": (lambda: index_first_axis(torch.tensor(1.0), ints(0)), VALUE, "x must have at least one"),
    "first axis, -1": (lambda: index_first_axis(Y, ints(0, -1)), INDEX, r"between 0 and 3, not -1 \(at \[1\]\)"),
    "first axis, int32": (lambda: index_first_axis(Y, ints(4).int()), INDEX, "indices must be between 0 and 3, not 4"),
    "first axis, far": (lambda: index_first_axis(Y, ints(2**62)), INDEX, f"not {2**62}"),
    "first axis of no row": (lambda: index_first_axis(Y[:0], ints(0)), INDEX, "indices must be between 0 and -1"),
    "first axis by bools": (lambda: index_first_axis(Y, ints(0).bool()), TYPE, "indices must be int32 or int64"),
    "first axis by 2 dimensions": (lambda: index_first_axis(Y, MASK), VALUE, r"indices must be \(total,\), not"),
    "put too few": (lambda: index_put_first_axis(Y, ints(0, 1), 9), VALUE, r"shapes \(4, 5\) and \(2\)"),
    "put outside": (
        lambda: index_put_first_axis(Y, ints(0, 1, 2, 9), 9),
        INDEX,
        "indices must be between 0 and 8",
    ),
    "put into None": (lambda: index_put_first_axis(Y, ints(0, 1, 2, 3), None), TYPE, "first_axis_dim must be an int"),  # type: ignore[arg-type]
    "put into less than none": (
        lambda: index_put_first_axis(Y, ints(0, 1, 2, 3), -1),
        VALUE,
        "first_axis_dim must",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_a_name(case: str) -> None:
    call, error, words = BAD[case]
    before = [t.clone() for t in (X, Y, MASK, METADATA.indices, METADATA.inverse)]
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.type is error
    for t, old in zip((X, Y, MASK, METADATA.indices, METADATA.inverse), before, strict=True):
        assert torch.equal(t, old)


HOSTILE = """
import itertools, torch, neox_kernels
x, y, mask = torch.randn(2, 3, 4), torch.randn(4, 5), torch.tensor([[1, 0, 1], [1, 1, 0]])
metadata = neox_kernels.varlen_metadata(mask)
indices, inverse = metadata.indices, metadata.inverse
good = {
    "gather_rows": ([x, x[..., 0]], indices, inverse),
    "varlen_metadata": (mask, 4, 2),
}
bad = [
    torch.tensor(1.0), torch.tensor([]), torch.ones(2, 2, 2, 2, 2), torch.ones(2, 3, 0), torch.zeros(0, 2**61),
    torch.ones(1).expand(2**31, 2**31), torch.zeros(2**40, 0, dtype=torch.int64), torch.tensor([2**63 - 1, -(2**63)]),
    torch.tensor([2**31 - 1]).int(), torch.tensor(0), inverse[None], x.to_sparse(), x.to(torch.complex64),
    x.to("meta"), indices.to("meta"), None, "x", 1.5, 2**62, -1, 2**63 - 1, 2**70, [], [x, y], [x, x.to("meta")],
    [x.to_sparse()], [torch.tensor(1.0)], [torch.ones(1).expand(2, 3, 2**30, 2**30)], [torch.ones([1] * 63)], [None],
]
for name, arguments in good.items():
    op = getattr(torch.ops.neox_kernels, name).default
    op(*arguments)
    for at, value in itertools.product(range(len(arguments)), bad):
        try:
            op(*arguments[:at], value, *arguments[at + 1 :])
        except Exception as error:
            assert str(error), (name, at)
        else:
            tensors = value if isinstance(value, list) else [value]
            if any(isinstance(t, torch.Tensor) and (t.is_meta or t.numel() > 2**30) for t in tensors):
                print("served, argument", at, "of", name, "being", value)
print("done")
"""


def test_raw_ops_raise_and_never_crash(backend: str, tmp_path: Path) -> None:
    if backend != "compiled":
        pytest.skip("the raw ops are the compiled ones")
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "done\n", f"{done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
