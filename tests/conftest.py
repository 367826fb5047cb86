"""What every test needs: the installed package under test, poisoned fresh memory, and no GPU tests without a GPU."""

import sys
from pathlib import Path

# At the repository's root `import kernels` would find our folder in place of Hugging Face's package of that name,
# which transformers imports. So the root leaves sys.path before anything is imported.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # for ptxsim and the other helpers of tests

import pytest
import torch

from neox_kernels.testing import poison_fresh_memory

poison_fresh_memory()
# Small tensors only wait for a second thread, and on a busy machine for long; the tests of threads ask for their own.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
