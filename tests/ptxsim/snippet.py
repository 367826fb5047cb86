"""A kernel around a few lines of PTX, for the simulator's own tests."""

from __future__ import annotations

from collections.abc import Sequence

HEADER = """
.version 9.0
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry snippet({parameters})
{{
  .reg .pred %p<10>;
  .reg .b16 %h<20>;
  .reg .b32 %r<40>;
  .reg .f32 %f<20>;
  .reg .b64 %rd<20>;
  .reg .f64 %fd<10>;
  .shared .align 16 .b8 array[512];
"""
# %r0 = thread, %r1 = block, %r2 = number in the grid; %rd0, %rd1 ... = the arguments.
NUMBERS = """
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mad.lo.s32 %r2, %r1, %r2, %r0;
"""


def snippet(lines: str, parameters: Sequence[str] = ("u64", "u64")) -> str:
    """A kernel that has these parameters in %rd0, %rd1, ... and its numbers in %r0, %r1, %r2."""
    declared = ", ".join(f".param .{kind} argument_{i}" for i, kind in enumerate(parameters))
    loads = "\n".join(f"  ld.param.{kind} %rd{i}, [argument_{i}];" for i, kind in enumerate(parameters))
    return f"{HEADER.format(parameters=declared)}{loads}{NUMBERS}{lines}\n  ret;\n}}\n"
