"""What every test needs: the installed package under test, poisoned fresh memory, and no GPU tests without a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# At the repository's root `import kernels` would find our folder in place of Hugging Face's package of that name,
# which transformers imports. So the root leaves sys.path before anything is imported.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # for what tests share: softmax_checks, ptxsim

import pytest
import torch

from neox_kernels import compiled, use_backend
from neox_kernels.testing import poison_fresh_memory

poison_fresh_memory()
# Small tensors only wait for a second thread, and on a busy machine for long; the tests of threads ask for their own.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cuda"))  # one process compiles, and only once
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["reference", "default", "avx2", "avx512", "avx512_bf16"])
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the compiled library with every instruction set that runs here."""
    if request.param == "reference":
        with use_backend("reference"):
            yield "reference"
        return
    if compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    before = compiled.cpu_isa()
    try:
        compiled.cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        with use_backend("compiled"):
            yield request.param
    finally:
        compiled.cpu_isa(before)


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA ops on ptxsim (cuda_on_ptxsim.CudaOps), compiled once: nvcc takes two minutes."""
    from cuda_on_ptxsim import CudaOps, missing

    reason = missing()
    if reason:
        pytest.skip(reason)
    return CudaOps(tmp_path_factory.mktemp("cuda"))
