"""transformers' own common model tests pass on swapped GPT-NeoX and GPT-J.

They come in the source distribution of the installed version, from the package index. They do not see a rotation of the
wrong sign or a wrong scale: test_swap.py does.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("parameterized")

SUITE = Path(__file__).with_name("hf_suite.py")
LEAST = 150  # of the tests; the others are for GPUs, other kinds of models, or the network


@pytest.fixture(scope="module")
def hf_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``tests`` of the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    name = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", name, "-d", str(folder)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = f"{name} cannot be had as a source distribution: {done.stderr[-300:]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def test_swapped_models_pass_the_tests_of_transformers(hf_tests: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    # Without this project's settings: these are another project's tests.
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--noconftest", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(SUITE), f"--junit-xml={report}"],
        env={**os.environ, "HF_TESTS": str(hf_tests), "HF_HUB_OFFLINE": "1", "SWAPPED": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [f"{case.get('classname')}.{case.get('name')}" for case in cases if case.find("failure") is not None]
    wrong += [f"{case.get('name')} (error)" for case in cases if case.find("error") is not None]
    assert not wrong, f"{wrong}\n{done.stdout[-5000:]}"
    assert sum(case.find("skipped") is None for case in cases) >= LEAST
