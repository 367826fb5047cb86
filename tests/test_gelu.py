"""GELU by its tanh formula: every instruction set, the specials, the gradient, torch.compile and bad input."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from neox_kernels import compiled, explain, gelu_tanh, reference, use_backend
from neox_kernels.testing import assert_within_budget

SHAPES = [(1, 1, 3072), (2, 512, 3072), (3, 7), (1,), (16385,), (0, 5), (), (4, 5, 6, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def isas() -> list[str]:
    """Every instruction set that runs here."""
    if compiled.load_error is not None:
        return []
    with pytest.raises(ValueError, match="have") as caught:
        compiled.cpu_isa("none")
    return str(caught.value).split(" have ")[1].split(", ")


@pytest.fixture(params=[*isas(), "reference"])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
    else:
        compiled.cpu_isa(request.param)
        yield request.param
        compiled.cpu_isa("best")


def randn(*shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


def by_formula(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_reference_is_the_formula() -> None:
    x = randn(10000).double()
    torch.testing.assert_close(reference.gelu_tanh(x), by_formula(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_budget(shape: tuple[int, ...], dtype: torch.dtype, served: str) -> None:
    x = randn(*shape).to(dtype)
    got = gelu_tanh(x)
    assert got.dtype == dtype and got.shape == x.shape
    assert_within_budget(got, gelu(x, approximate="tanh"), by_formula(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_magnitude(dtype: torch.dtype, served: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).to(dtype)
    x = x[x.isfinite()]
    wide = x.double()
    got, same, truth = gelu_tanh(x), gelu(x, approximate="tanh"), by_formula(wide)
    # By binades: beside numbers of 1e38 no error would show.
    for power in range(-30, 6):
        some = (wide.abs() >= 2.0**power) & (wide.abs() < 2.0 ** (power + 1))
        assert_within_budget(got[some], same[some], truth[some], f"2^{power}")
    large = wide.abs() >= 2.0**6
    assert torch.equal(got[large], x[large].clamp_min(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_specials(dtype: torch.dtype, served: str) -> None:
    inf = math.inf
    x = torch.tensor([math.nan, inf, -inf, 0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)
    got = gelu_tanh(x)
    assert got[0].isnan() and got[2].isnan()  # 0 times -inf, as in the formula
    assert torch.equal(got[[1, 3, 4, 5, 6]], torch.tensor([inf, 0.0, 0.0, torch.finfo(dtype).max, 0.0]).to(dtype))
    assert got[4].signbit() and not got[3].signbit()


def test_it_keeps_digits_of_the_tail(served: str) -> None:
    x = torch.linspace(-8, -4, 1001)
    if served != "reference":  # 1 + tanh(u) has none left
        torch.testing.assert_close(gelu_tanh(x).double(), tail(x.double()), rtol=2e-5, atol=0)


def tail(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, served: str) -> None:
    x = randn(6, 8, 40).to(dtype)
    for view in (x.transpose(0, 1), x[:, ::2, 3:], x[:1].expand(4, -1, -1), x.flatten()[1:]):
        assert torch.equal(gelu_tanh(view), gelu_tanh(view.clone(memory_format=torch.contiguous_format)))
        assert gelu_tanh(view).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 3072), (3, 7), (1,), (16385,), (700, 33), (0, 5), (5, 0)], ids=str)
def test_in_place_with_a_bias(shape: tuple[int, ...], dtype: torch.dtype, served: str) -> None:
    x, bias = randn(*shape).to(dtype), randn(shape[-1], scale=1.0).to(dtype)
    same, truth = gelu(x + bias, approximate="tanh"), by_formula(x.double() + bias.double())
    apart = gelu_tanh(x, bias)
    for given in (bias, torch.stack((bias, bias), 1)[:, 0]):
        written = x.clone()
        got = gelu_tanh(written, given, inplace=True)
        assert got is written and written._version > 0
        for result in (apart, got):
            assert_within_budget(result, same, truth)
    alone = x.clone()
    assert torch.equal(gelu_tanh(alone, inplace=True), gelu_tanh(x))
    if len(shape) == 1:  # a bias within what is written
        within = x.clone()
        assert_within_budget(
            gelu_tanh(within, within, inplace=True), gelu(2 * x, approximate="tanh"), by_formula(2 * x.double())
        )


def test_gradient_of_the_bias(served: str) -> None:
    x, bias = randn(4, 30).requires_grad_(), randn(30, scale=1.0).requires_grad_()
    got = torch.autograd.grad(gelu_tanh(x, bias).sum(), (x, bias))
    expected = torch.autograd.grad(by_formula(x + bias).sum(), (x, bias))
    torch.testing.assert_close(got, expected)
    for given in ((x, None), (x.detach(), bias)):
        with pytest.raises(ValueError, match="inplace must be False"):
            gelu_tanh(*given, inplace=True)
    with torch.no_grad():
        gelu_tanh(x.clone(), bias, inplace=True)


def test_float64_is_served_by_the_reference() -> None:
    x = randn(50).double()
    assert torch.equal(gelu_tanh(x), reference.gelu_tanh(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(dtype: torch.dtype, served: str) -> None:
    x, grad = randn(4, 300).to(dtype).requires_grad_(), randn(4, 300, scale=1.0).to(dtype)
    wide = x.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(gelu_tanh(x), x, grad)
    (same,) = torch.autograd.grad(gelu(x, approximate="tanh"), x, grad)
    (truth,) = torch.autograd.grad(by_formula(wide), wide, grad.double())
    assert_within_budget(got, same, truth)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_gradcheck(backend: str) -> None:
    if backend == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    x = randn(30).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(gelu_tanh, x, eps=1e-2, atol=2e-3, fast_mode=True)
    assert torch.autograd.gradcheck(gelu_tanh, x.detach().double().requires_grad_())


@pytest.mark.skipif(compiled.load_error is not None, reason=str(compiled.load_error))
def test_opcheck_and_compile() -> None:
    x = randn(5, 33)
    torch.library.opcheck(torch.ops.neox_kernels.gelu_tanh.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.neox_kernels.gelu_tanh.inference, (x,))
    torch.library.opcheck(torch.ops.neox_kernels.gelu_tanh_.default, (x.clone(), x[0]))
    torch.library.opcheck(torch.ops.neox_kernels.gelu_tanh_.default, (x.clone(), None))
    whole = torch.compile(gelu_tanh, fullgraph=True)
    torch.testing.assert_close(whole(x), gelu_tanh(x), rtol=0, atol=0)
    y = x.clone().requires_grad_()
    whole(y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, torch.autograd.grad(gelu_tanh(y).sum(), y)[0])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        gelu_tanh([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"float16 or float64, not torch\.int64"):
        gelu_tanh(torch.ones(3, dtype=torch.int64))
    x = randn(4, 6)
    with pytest.raises(TypeError, match="bias must be a tensor, not list"):
        gelu_tanh(x, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bias must be torch\.float32 like x, not torch\.float64"):
        gelu_tanh(x, x[0].double())
    for bias in (x, x[0, :1], x[0, 0]):
        with pytest.raises(ValueError, match="bias must be of the last dimension of x"):
            gelu_tanh(x, bias)
        if compiled.load_error is None:
            with pytest.raises(ValueError, match="bias must be of the last dimension of x"):
                torch.ops.neox_kernels.gelu_tanh_(x, bias)
    with pytest.raises(ValueError, match="x must be contiguous"):
        gelu_tanh(x.T, inplace=True)
    with pytest.raises(TypeError, match="inplace must be True or False"):
        gelu_tanh(x, inplace=1)  # type: ignore[arg-type]


def test_a_gpu_is_served_by_pytorch() -> None:
    choice = explain("gelu_tanh", "cuda")[0]
    assert choice.backend == "reference"
