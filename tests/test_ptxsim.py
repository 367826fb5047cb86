"""The simulator's checks: each finds the fault that is planted for it, and says nothing of the kernel without it."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from ptxsim import (
    ArithmeticFault,
    Buffer,
    Counters,
    Fault,
    MemoryFault,
    PtxError,
    Race,
    SyncFault,
    Trap,
    UninitialisedRead,
    launch,
)
from ptxsim.snippet import snippet

# %rd2 and %rd3: the addresses of this lane's words of the two arguments.
WORDS = """
  mul.wide.u32 %rd4, %r2, 4;
  add.s64 %rd2, %rd0, %rd4;
  add.s64 %rd3, %rd1, %rd4;
"""
COPY = WORDS + "ld.global.u32 %r3, [%rd2]; st.global.u32 [%rd3], %r3;"


def run(lines: str, x: np.ndarray, y: np.ndarray, grid: int = 1, block: int = 32, **options: object) -> Counters:
    """Read x, which is written, and write y, which is not."""
    arguments = [x.__array_interface__["data"][0], y.__array_interface__["data"][0]]
    return launch(snippet(lines), [grid], block, arguments, [Buffer(x), Buffer(y, False)], **options)


def words(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint32) * 3 + 1


def fresh(n: int) -> np.ndarray:
    return np.full(n, 0xDEADBEEF, np.uint32)


def finds(fault: type[Fault], says: str, lines: str, x: np.ndarray, y: np.ndarray, **options: object) -> None:
    with pytest.raises(fault, match=says):
        run(lines, x, y, **options)


def test_a_copy_is_quiet_and_counted() -> None:
    x, y = words(256), fresh(256)
    counters = run(COPY, x, y, grid=4, block=64)
    assert np.array_equal(x, y)
    assert counters.loads.requests == counters.stores.requests == 8
    assert counters.loads.dram_sectors in (32, 33)
    assert counters.warp_instructions == 8 * 12 and counters.instructions_per(256) == 12
    assert counters.by_opcode["st"] == 8


def test_counts_by_source_line_and_by_width() -> None:
    """Before the first .loc it is line 0; a branch that is skipped runs nothing of its line."""
    lines = "\n.loc 1 7 0\n" + WORDS + "\n.loc 1 9 3, function_name $x\n ld.global.u32 %r3, [%rd2];\n"
    lines += "setp.eq.u32 %p1, %r0, %r0;\n@%p1 bra over;\n.loc 1 11 0\nadd.u32 %r3, %r3, 1;\nover:\n"
    lines += ".loc 1 12 0\nst.global.u32 [%rd3], %r3;\n"
    x, y = words(128), fresh(128)
    counters = run(lines, x, y, grid=2, block=64)
    assert np.array_equal(x, y)
    assert counters.by_line == {0: 4 * 6, 7: 4 * 3, 9: 4 * 3, 12: 4 * 2}
    assert counters.loads.sectors_by_width == {4: counters.loads.l1_sectors}


def test_some_blocks_of_a_grid() -> None:
    x, y = words(256), fresh(256)
    counters = run(COPY, x, y, grid=4, block=64, blocks=[1, 3])
    assert np.array_equal(x[64:128], y[64:128]) and np.array_equal(x[192:], y[192:])
    assert (y[:64] == 0xDEADBEEF).all() and (y[128:192] == 0xDEADBEEF).all()
    assert counters.warp_instructions == 4 * 12


def test_strided_access_costs_sectors() -> None:
    x, y = words(32 * 16), fresh(32 * 16)
    lines = (
        WORDS + "shl.b64 %rd5, %rd4, 4; add.s64 %rd5, %rd0, %rd5; ld.global.u32 %r3, [%rd5]; st.global.u32 [%rd3], %r3;"
    )
    counters = run(lines, x, y)
    assert counters.loads.l1_sectors == 32 and counters.stores.l1_sectors in (4, 5)
    assert np.array_equal(y[:32], x[::16])


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(PtxError, match=r"wgmma\.fence\.sync\.aligned"):
        run("wgmma.fence.sync.aligned;", words(1), fresh(1))
    with pytest.raises(PtxError, match=r"add\.cc"):
        run("add.cc.u32 %r3, %r0, %r0;", words(1), fresh(1))
    with pytest.raises(PtxError, match="%smid"):
        run("mov.u32 %r3, %smid;", words(1), fresh(1))


# ------------------------------------------------------------------------------------------------------------- memory


def test_out_of_bounds() -> None:
    finds(MemoryFault, "load of 4 bytes out of bounds .*past the end.*thread 31", COPY, words(31), fresh(32))
    finds(MemoryFault, "store of 4 bytes", COPY, words(32), fresh(31))
    run(COPY.replace("ld.", "setp.lt.u32 %p1, %r0, 31; @!%p1 ret; ld."), words(31), fresh(31))
    before = WORDS + "ld.global.u32 %r3, [%rd2+-4];"
    finds(MemoryFault, "4 bytes before a buffer", before, words(32), fresh(32))


def test_between_the_elements_of_a_view() -> None:
    """A slice of a tensor ends where the slice ends, though the memory goes on."""
    whole = words(64)
    run(COPY, whole[32:], fresh(32))
    finds(MemoryFault, "between its elements", COPY, whole[::2], fresh(32))


def test_neighbours_on_the_host_are_none_on_the_device() -> None:
    whole = words(96)
    finds(MemoryFault, "past the end", COPY.replace("[%rd2]", "[%rd2+4]"), whole[:32], whole[32:])


def test_misaligned() -> None:
    vector = WORDS + "ld.global.v2.u32 {%r3, %r4}, [%rd2];"
    finds(MemoryFault, "misaligned load of 8 bytes", vector, words(64), fresh(1))
    wide = "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd0+8];"
    aligned = words(64)[(-words(64).ctypes.data % 16) // 4 :]
    finds(MemoryFault, "misaligned load of 16 bytes", wide, aligned, fresh(1))


def test_uninitialised_memory() -> None:
    finds(UninitialisedRead, "global memory", WORDS + "ld.global.u32 %r3, [%rd3];", words(32), fresh(32))
    run(COPY + "ld.global.u32 %r4, [%rd3];", words(32), fresh(32))
    shared = "ld.shared.u32 %r3, [array];"
    finds(UninitialisedRead, "shared memory", shared, words(1), fresh(1))


def test_uninitialised_registers() -> None:
    """Computed with they may be, as compilers do; they must not decide anything."""
    finds(UninitialisedRead, "an address", "ld.global.u32 %r3, [%rd9];", words(1), fresh(1))
    finds(UninitialisedRead, "a predicate", "@%p3 mov.u32 %r3, 0;", words(1), fresh(1))
    finds(
        UninitialisedRead,
        "global memory",
        WORDS + "add.s32 %r3, %r0, %r9; st.global.u32 [%rd3], %r3;",
        words(1),
        fresh(32),
    )
    chosen = "add.s32 %r3, %r0, %r9; setp.ge.u32 %p1, %r0, 0; selp.b32 %r4, %r0, %r3, %p1; st.global.u32 [%rd3], %r4;"
    run(WORDS + chosen, words(1), fresh(32))
    some = WORDS + "setp.lt.u32 %p1, %r0, 16; @%p1 mov.u32 %r3, 7; {} st.global.u32 [%rd3], %r3;"
    finds(UninitialisedRead, "thread 16", some.format(""), words(1), fresh(32))
    run(some.format("@%p1"), words(1), fresh(32))


def test_half_of_a_register() -> None:
    """sm_100 packs a number with nothing; that counts once the nothing is used."""
    pack = WORDS + "mov.b64 %rd5, {%r0, %r9}; mov.b64 {%r3, %r4}, %rd5; st.global.u32 [%rd3], "
    y = fresh(32)
    run(pack + "%r3;", words(1), y)
    assert np.array_equal(y, np.arange(32))
    finds(UninitialisedRead, "global memory", pack + "%r4;", words(1), fresh(32))
    add = (
        WORDS
        + "mov.b64 %rd5, {%r0, %r9}; add.rn.f32x2 %rd6, %rd5, %rd5; mov.b64 {%r3, %r4}, %rd6; st.global.u32 [%rd3], "
    )
    run(add + "%r3;", words(1), fresh(32))
    finds(UninitialisedRead, "global memory", add + "%r4;", words(1), fresh(32))
    run(WORDS + "mov.b64 %rd5, {%r0, %r9}; cvt.u32.u64 %r3, %rd5; st.global.u32 [%rd3], %r3;", words(1), fresh(32))


def test_dynamic_shared_memory_ends() -> None:
    lines = "mov.u32 %r3, dynamic; mad.lo.u32 %r3, %r0, 4, %r3; st.shared.u32 [%r3], %r0;"
    run(lines, words(1), fresh(1), shared_bytes=128)
    finds(MemoryFault, "shared memory", lines, words(1), fresh(1), shared_bytes=124)
    # Beyond a static array too, though other memory follows.
    static = "mov.u32 %r3, array; mad.lo.u32 %r3, %r0, 4, %r3; st.shared.u32 [%r3+{}], %r0;"
    run(static.format(384), words(1), fresh(1), shared_bytes=4096)
    finds(MemoryFault, "thread 31", static.format(388), words(1), fresh(1), shared_bytes=4096)


def test_struct_parameters_are_read_by_address() -> None:
    """As nvcc reads a __grid_constant__ struct."""
    lines = """
      mov.b64 %rd5, argument_1; mul.wide.u32 %rd6, %r0, 4; add.s64 %rd5, %rd5, %rd6; ld.param.u32 %r3, [%rd5+4];
      add.s64 %rd6, %rd0, %rd6; st.global.u32 [%rd6], %r3;
    """
    text = snippet(lines).replace("ld.param.u64 %rd1, [argument_1];", "")
    text = text.replace(".param .u64 argument_1", ".param .align 4 .b8 argument_1[132]")
    y = fresh(32)
    launch(text, [1], 32, [y.ctypes.data, words(33).tobytes()], [Buffer(y, False)])
    assert np.array_equal(y, words(33)[1:])
    with pytest.raises(MemoryFault, match="param memory"):
        launch(text.replace("+4", "+8"), [1], 32, [y.ctypes.data, words(33).tobytes()], [Buffer(y, False)])


# -------------------------------------------------------------------------------------------------------------- races

# Each thread stores a word of shared memory and loads that of the thread 32 further.
EXCHANGE = WORDS + """
  mov.u32 %r5, array; mad.lo.u32 %r4, %r0, 4, %r5; ld.global.u32 %r3, [%rd2]; st.shared.u32 [%r4], %r3;
  bar.sync 0;
  add.u32 %r6, %r0, 32; and.b32 %r6, %r6, 63; mad.lo.u32 %r6, %r6, 4, %r5; ld.shared.u32 %r3, [%r6];
  st.global.u32 [%rd3], %r3;
"""  # fmt: skip


def test_race_between_warps() -> None:
    x, y = words(128), fresh(128)
    run(EXCHANGE, x, y, grid=2, block=64)
    assert np.array_equal(y.reshape(2, 2, 32), x.reshape(2, 2, 32)[:, ::-1])
    finds(Race, "reads what another warp wrote", EXCHANGE.replace("bar.sync 0;", ""), x, fresh(128), grid=2, block=64)
    again = EXCHANGE + "st.shared.u32 [%r4], %r0;"
    finds(Race, "writes what another warp", again, x, fresh(128), grid=2, block=64)
    run(EXCHANGE + "bar.sync 0; st.shared.u32 [%r4], %r0;", x, fresh(128), grid=2, block=64)
    run("st.shared.u32 [array], 7;", x, y, block=64)  # one value from several warps is no race
    finds(Race, "different values to one place", "st.shared.u32 [array], %r0;", x, y)


def test_race_between_blocks() -> None:
    overlapping = COPY.replace("st.", "sub.s64 %rd5, %rd3, 4; setp.gt.u32 %p1, %r1, 0; @%p1 mov.b64 %rd3, %rd5; st.")
    finds(Race, "two blocks write", overlapping, words(64), fresh(64), grid=2)
    run(overlapping, words(32), fresh(32), grid=1)
    reads = (
        WORDS
        + "st.global.u32 [%rd3], %r0; xor.b32 %r4, %r2, 32; mad.wide.u32 %rd5, %r4, 4, %rd1; ld.global.u32 %r3, [%rd5];"
    )
    finds(Race, "block", reads, words(64), words(64), grid=2)
    x = words(64)
    run(WORDS + "ld.global.u32 %r3, [%rd0]; st.global.u32 [%rd3], %r3;", x, fresh(64), grid=2)  # all read one word


def test_order_of_blocks_may_change() -> None:
    x, y = words(1024), fresh(1024)
    run(COPY, x, y, grid=32, order=3)
    assert np.array_equal(x, y)


# ------------------------------------------------------------------------------------------------------------ threads


def test_divergence_and_reconvergence() -> None:
    lines = WORDS + """
      mov.u32 %r3, 0; mov.u32 %r4, 0;
    LOOP:
      setp.ge.u32 %p1, %r4, %r0; @%p1 bra DONE;
      and.b32 %r5, %r4, 1; setp.eq.u32 %p2, %r5, 0; @%p2 bra EVEN;
      add.u32 %r3, %r3, %r4; bra.uni NEXT;
    EVEN:
      add.u32 %r3, %r3, 1;
    NEXT:
      add.u32 %r4, %r4, 1; bra LOOP;
    DONE:
      bar.warp.sync -1;
      shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;
      st.global.u32 [%rd3], %r6;
    """  # fmt: skip
    y = fresh(64)
    run(lines, words(64), y, grid=2)
    expected = [sum(i if i % 2 else 1 for i in range(n ^ 1)) for n in range(32)]
    assert y.reshape(2, 32).tolist() == [expected] * 2


def test_a_barrier_that_some_never_reach() -> None:
    lines = "setp.lt.u32 %p1, %r0, 32; @%p1 bra SKIP; bar.sync 0; SKIP: {}"
    finds(
        SyncFault, '32 threads at "bar.sync 0"', lines.format("bar.sync 1; bar.sync 1;"), words(1), fresh(1), block=64
    )
    run(lines.format(""), words(1), fresh(1), block=64)  # those that have left are not waited for


def test_shuffles_without_their_partners() -> None:
    lines = "setp.lt.u32 %p1, %r0, 16; @%p1 bra END; shfl.sync.bfly.b32 %r3, %r0, 1, 31, {}; END:"
    finds(SyncFault, "exited", lines.format("-1"), words(1), fresh(1))
    run(lines.format("0xffff0000"), words(1), fresh(1))
    finds(SyncFault, "does not take part", lines.replace("r0, 1,", "r0, 16,").format("0xffff0000"), words(1), fresh(1))
    finds(SyncFault, "own mask", lines.format("0xff000000"), words(1), fresh(1))


def test_faults_of_arithmetic() -> None:
    finds(ArithmeticFault, "division by zero.*thread 0", "div.u32 %r3, %r0, %r0;", words(1), fresh(1))
    finds(ArithmeticFault, "division by zero", "rem.s32 %r3, %r0, %r0;", words(1), fresh(1))
    run("setp.ne.u32 %p1, %r0, 0; @%p1 div.u32 %r3, %r0, %r0;", words(1), fresh(1))
    finds(ArithmeticFault, "shift by the width", "add.u32 %r3, %r0, 1; shl.b32 %r3, %r0, %r3;", words(1), fresh(1))
    run("shl.b32 %r3, %r0, %r0;", words(1), fresh(1))


def test_traps_and_what_is_ignored() -> None:
    finds(Trap, "gave up", "trap;", words(1), fresh(1))
    run(COPY, words(31), fresh(32), ignore=(MemoryFault, UninitialisedRead))


def test_what_a_launch_left_out_is_known_to_the_next() -> None:
    x, y, z = words(32), fresh(32), fresh(32)
    written = np.zeros((32, 4), bool)
    address = {name: array.__array_interface__["data"][0] for name, array in (("x", x), ("y", y), ("z", z))}
    half = "setp.lt.u32 %p0, %r0, 16;" + WORDS + "ld.global.u32 %r3, [%rd2]; @%p0 st.global.u32 [%rd3], %r3;"
    launch(snippet(half), [1], 32, [address["x"], address["y"]], [Buffer(x), Buffer(y, written)])
    assert written[:16].all() and not written[16:].any()
    copy_half = "setp.lt.u32 %p0, %r0, 16;" + WORDS + "@%p0 ld.global.u32 %r3, [%rd2]; @%p0 st.global.u32 [%rd3], %r3;"
    launch(snippet(copy_half), [1], 32, [address["y"], address["z"]], [Buffer(y, written), Buffer(z, False)])
    with pytest.raises(UninitialisedRead):
        launch(snippet(COPY), [1], 32, [address["y"], address["z"]], [Buffer(y, written), Buffer(z, False)])


def test_rows_far_apart() -> None:
    """Their distance is kept, and what lies between them is neither copied nor theirs."""
    step = 1 << 31
    memory = mmap.mmap(-1, step + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = np.lib.stride_tricks.as_strided(np.frombuffer(memory, np.uint32), (2, 32), (step, 4))
    rows[:] = words(64).reshape(2, 32)
    y, at = fresh(32), rows.__array_interface__["data"][0]

    def load(distance: int) -> None:
        lines = WORDS + f"ld.global.u32 %r3, [%rd2+{distance}]; st.global.u32 [%rd3], %r3;"
        arguments = [at, y.__array_interface__["data"][0]]
        launch(snippet(lines), [1], 32, arguments, [Buffer(rows), Buffer(y, False)])

    load(step)
    assert np.array_equal(y, rows[1])
    for outside in (step + 4, step - 4, 4, -step):
        with pytest.raises(MemoryFault):
            load(outside)
