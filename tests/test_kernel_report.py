"""The report on GPU kernels by known answers: machine code written by hand, occupancies, planted figures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("typer")

import kernel_report_golden as golden
from typer.testing import CliRunner

from neox_kernels import cli
from neox_kernels.kernel_report import command, gcn, rows, sass, simulate
from neox_kernels.kernel_report.cards import ARCHS, CARDS, occupancy
from neox_kernels.kernel_report.cases import all_cases
from neox_kernels.kernel_report.compile import number_lines
from neox_kernels.kernel_report.cuda import cut_kernel
from neox_kernels.kernel_report.page import render
from neox_kernels.kernel_report.rows import Row, missed_gates

# As nvdisasm -c -g writes it. Lines 1 to 3 of the PTX come before a loop over lines 4 to 7; line 9 divides.
SASS = """
	.section	.text.first_kernel,"ax",@progbits
first_kernel:
.text.first_kernel:
	//## File "kernel.ptx", line 1
        /*0000*/                   LDC R1, c[0x0][0x28] ;
	//## File "kernel.ptx", line 4
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
	//## File "kernel.ptx", line 2
        /*0020*/                   S2R R0, SR_TID.X ;
        /*0030*/                   LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
.L_x_1:
	//## File "kernel.ptx", line 4
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/              @!P0 LDG.E R8, desc[UR4][R2.64+0x10] ;
	//## File "kernel.ptx", line 5
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R4 ;
	//## File "kernel.ptx", line 7
        /*0070*/               @P0 BRA `(.L_x_1) ;
	//## File "kernel.ptx", line 9
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn) ;
	//## File "kernel.ptx", line 8
        /*0090*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*00a0*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm20_div_rn
$__internal_0_$__cuda_sm20_div_rn:
	//## File "kernel.ptx", line 9
        /*00b0*/                   MUFU.RCP R0, R1 ;
.L_x_2:
        /*00c0*/                   RET.REL.NODEC R2 `(first_kernel) ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
        /*00e0*/                   NOP;
	.section	.text.second_kernel,"ax",@progbits
second_kernel:
        /*0000*/                   EXIT ;
"""


def test_sass() -> None:
    code = sass.parse_code(SASS)
    assert code.keys() == {"first_kernel", "second_kernel"}
    first = code["first_kernel"]
    assert [len(block) for block in first.blocks] == [4, 4, 1, 2] and len(first.subroutines) == 2
    assert [instruction.opcode for instruction in first][:2] == ["LDC", "ULDC.64"]
    assert first.widths("LDG", "LD") == {16: 1, 4: 1, 2: 1} and next(iter(first.widths("LDG"))) == 16
    assert first.widths("STG") == {32: 1, 8: 1}
    # The loop's constant stands before the loop, and counts as often as what stands there.
    by_line = {1: 2, 2: 2, 3: 2, 4: 20, 5: 20, 7: 20, 8: 2, 9: 2}
    assert first.executed(by_line) == 4 * 2 + 4 * 20 + 1 * 2 + 2 * 2
    assert first.executed({}) == 0


def test_usage() -> None:
    text = """Resource usage:\n Common:\n  GLOBAL:0\n Function _Z1kv:
  REG:54 STACK:16 SHARED:1032 LOCAL:8 CONSTANT[0]:744 TEXTURE:0 SURFACE:0 SAMPLER:0\n"""
    assert sass.parse_usage(text) == {"_Z1kv": sass.Usage(54, 24, 1032)}


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared_bytes", "share", "limit"),
    [
        ("sm_90", 256, 32, 0, 1.0, "warps"),
        ("sm_90", 256, 33, 0, 0.75, "registers"),  # 40 granted: 12 warps in each part
        ("sm_80", 128, 64, 0, 0.5, "registers"),
        ("sm_80", 1024, 64, 0, 0.5, "registers"),
        ("sm_80", 1024, 65, 0, 0.0, "registers"),  # too many to start
        ("sm_90", 32, 16, 0, 0.5, "blocks"),
        ("sm_80", 64, 255, 0, 0.125, "registers"),  # two warps of 8192 in each part's 16384
        ("sm_80", 256, 32, 40 * 1024, 0.5, "shared memory"),  # 4 of 41 KiB in 164
        ("sm_90", 256, 32, 40 * 1024, 0.625, "shared memory"),
        ("sm_100", 128, 16, 227 * 1024, 0.0625, "shared memory"),
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared_bytes: int, share: float, limit: str) -> None:
    held = occupancy(CARDS[arch], threads, registers, shared_bytes)
    assert (held.share, held.limit) == (share, limit)


@pytest.mark.parametrize("bad", [{"threads": 0}, {"threads": 1025}, {"registers": 256}, {"shared_bytes": -1}])
def test_occupancy_of_nonsense(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        occupancy(CARDS["sm_90"], **{"threads": 32, "registers": 32, "shared_bytes": 0, **bad})


def test_prediction() -> None:
    assert CARDS["sm_90"].predicted_seconds(0.85 * 3.35e12) == pytest.approx(1.0)


def test_assembly_of_amd() -> None:
    text = """
	global_load_dwordx4 v[0:3], v4, s[0:1]
	buffer_load_ushort v5, v6, s[4:7], 0 offen
	global_store_dwordx2 v7, v[0:1], s[2:3]
	global_store_byte v7, v0, s[2:3]
; Occupancy: 6
    .group_segment_fixed_size: 1024
    .sgpr_spill_count: 1
    .vgpr_count:     72
    .vgpr_spill_count: 2
"""
    found = gcn.parse_assembly(text)
    assert found == gcn.Assembly(72, 3, 1024, 6, {16: 1, 2: 1}, {8: 1, 1: 1})
    with pytest.raises(ValueError, match="vgpr_count"):
        gcn.parse_assembly(text.replace(".vgpr_count", ".other"))


PTX = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry one(.param .u64 a)
{
	.reg .b32 %r<3>;
	.loc 7 40 3
	mov.u32 %r1, %tid.x;
$L__tmp1:
	@%p1 bra $L__tmp1;
	{ cvt.rn.bf16x2.f32 %r2, %f1, %f2; }
	ret;
}
.visible .entry two()
{
	ret;
}
	.section .debug_loc { .b8 1 }
"""


def test_lines_of_the_ptx() -> None:
    text = number_lines(PTX)
    assert ".loc 7" not in text and ".debug_loc" not in text and text.count(".file") == 1
    lines = text.splitlines()
    numbered = {lines[i + 1].split()[0]: line for i, line in enumerate(lines) if line.startswith(".loc")}
    assert numbered["mov.u32"] == ".loc 1 7 0" and set(numbered) == {"mov.u32", "@%p1", "{", "ret;"}
    assert "entry one" not in cut_kernel(PTX, "two") and cut_kernel(PTX, "one").startswith(".version")


def test_sample() -> None:
    assert simulate.sample(3, 10**9) == range(3)
    blocks = simulate.sample(2048, 4 * simulate.ELEMENTS)
    assert len(blocks) == 512 and sum(blocks) / 512 == pytest.approx(1023.5, abs=1)


# One Triton kernel, with everything.
@pytest.fixture(scope="module")
def row() -> Row:
    return rows.triton_row(next(case for case in all_cases() if case.kernel == "softmax forward"), "sm_90")


def test_row(row: Row) -> None:
    assert row.loads == {16: 6} and row.stores == {16: 8} and row.spill_bytes == 0 and not row.absent
    assert row.dram_bytes == pytest.approx(row.minimum_bytes, rel=0.02) and row.predicted_card == "H100"
    # Half of the rows see at most half of the keys, and run the half tile: between the code of either and all of it.
    assert row.instructions and row.instructions_run and 10 < row.instructions_run < row.instructions * 64 / 2048
    assert missed_gates(row) == []


@pytest.mark.parametrize(
    ("planted", "gate"),
    [
        ({"spill_bytes": 8}, "spill_bytes 8, limit 0"),
        ({"narrow_share": 0.5}, "narrow_share 0.500"),
        ({"torn_share": 0.3}, "torn_share 0.300"),
        ({"dram_bytes": 3.4}, "dram_bytes 3.400"),
        ({"instructions_run": 20.1}, "instructions_run 20.10, limit 20"),
    ],
)
def test_a_worse_row_is_named(row: Row, planted: dict[str, Any], gate: str) -> None:
    assert any(text.startswith(gate) for text in missed_gates(replace(row, **planted)))


@pytest.mark.parametrize(
    "planted",
    [{"registers": 60}, {"shared_bytes": 4096}, {"occupancy": 0.5}, {"stores": {16: 8, 2: 1}}, {"l1_bytes": 3.5}],
    ids=str,
)
def test_golden_file_names_what_is_worse(row: Row, planted: dict[str, Any]) -> None:
    limits = golden.figures(row)
    assert golden.worse(row, limits) == golden.better(row, limits) == []
    changed = replace(row, **planted)
    (found,) = golden.worse(changed, limits)
    assert found.startswith(row.name) and "limit" in found
    assert len(golden.better(row, golden.figures(changed))) == 1


def test_golden_file_is_as_it_is_written(row: Row) -> None:
    text = golden.as_text([row], {"triton": "1"})
    assert json.loads(text)["rows"] == {row.name: golden.figures(row)}
    assert golden.FILE.read_text().splitlines()[0] == golden.as_text([], golden.read()["versions"]).splitlines()[0]


def test_report(row: Row) -> None:
    worse = replace(row, spill_bytes=8, configuration="<b>")
    report = command.as_dict([row, worse], {"triton": "3"}, {"cuda": "no nvcc found"})
    assert json.loads(json.dumps(report))["rows"][1]["missed_gates"] == ["spill_bytes 8, limit 0"]
    page = render([row, worse], report)
    assert "no nvcc found" in page and "No GPU time was measured" in page and "predicted" in page
    assert "&lt;b&gt;: spill" not in page and "&lt;b&gt;" in page and "<b>," not in page
    assert "http" not in page and "<script" not in page, "one file that needs nothing else"


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli._app(), ["kernel-report", *arguments], terminal_width=200)


def test_unknown_architecture() -> None:
    done = call("--arch", "sm_70")
    assert done.exit_code == 2 and "sm_70 is not known" in done.output and all(arch in done.output for arch in ARCHS)


def test_unwritable_file(tmp_path: Path) -> None:
    done = call("--html", str(tmp_path / "missing" / "page.html"))
    assert done.exit_code == 2 and "page.html" in done.output and "--html" in done.output
    cli.check_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled only, so without nvcc."""
    monkeypatch.setattr(command, "all_cases", lambda: [case for case in all_cases() if case.kernel == "varlen count"])
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    done = call("--arch", "gfx942", "--json", str(file), "--html", str(page))
    assert done.exit_code == 0, done.output
    (found,) = json.loads(file.read_text())["rows"]
    assert (found["backend"], found["arch"], found["instructions_run"]) == ("triton", "gfx942", None)
    assert "compiled only" in found["absent"]["instructions_run"] and page.read_text().startswith("<!doctype html>")


def test_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass.Path, "exists", lambda self: False)
    done = call("--arch", "gfx942")
    assert done.exit_code == 1 and "nvdisasm is missing" in str(done.exception)


def test_without_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise simulate.Unavailable("tests/ptxsim is not here")

    monkeypatch.setattr(simulate, "find_tests", missing)
    row = rows.triton_row(next(case for case in all_cases() if case.kernel == "varlen count"), "sm_90")
    assert row.dram_bytes is row.instructions_run is None and row.absent["dram_bytes"] == "tests/ptxsim is not here"
    assert row.registers > 0 and row.predicted_us and missed_gates(row) == []
