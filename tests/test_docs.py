"""What the documents say: tables of measured records, and the links between them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bench_calls import bench

from neox_kernels.bench import publish, selection
from neox_kernels.bench.record import Record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "xeon-amx"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_tables_are_those_of_the_records() -> None:
    records = {path.stem: Record.read(path) for path in RESULTS.glob("*.json")}
    golden = json.loads((ROOT / "tests" / "kernel_report_golden.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    assert publish.fill(text, records, golden) == text
    shown = {match["name"] for match in publish.BLOCK.finditer(text)}
    assert shown == {*records, "static"}, "a record that nobody reads, or a table of none"
    assert all(record.complete and not record.wrong for record in records.values())


def test_a_table_says_where_a_peer_is_faster() -> None:
    record = Record.read(RESULTS / "softmax.json")
    text = "\n".join(publish.tables(record))
    slower = sum(case.ratio(result).middle < 1 for case, result in record.rows() if result.role in ("peer", "added"))
    assert text.count("| **") == slower
    assert text.count("\n| ") >= len(record.cases)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module and its command, as they stand in the document, on a small grid."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    (code,) = re.findall(r"```python\n(# mymodule\.py\n.*?)```", text, re.DOTALL)
    (line,) = re.findall(r"neox-kernels (bench rotary --add \S+)\n", text)
    (tmp_path / "mymodule.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = [*line.split()[1:], "--shape", "pythia-160m,gpt-j-6b", "--grid", "1x7", "--kind", "forward"]
    record = bench(tmp_path, *words)
    assert len(record.cases) == 4
    assert all("my_rotary" in {result.name for result in case.results} for case in record.cases)


def test_the_table_of_functions_has_every_op() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    named = {name for row in re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(selection.FAMILIES)
