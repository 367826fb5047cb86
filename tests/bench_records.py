"""Records of made-up benchmark runs, for the tests of what is written from them: some with every oddity."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from neox_kernels.bench.record import OURS, CaseRecord, Record, Result

EVIL = "<script>alert('x')</script> & $co_"
ABSENT = {"flash-attn": "ModuleNotFoundError: No module named 'flash_attn'", EVIL: 'RuntimeError: a < b & "c"'}
MACHINE = {
    "device": "cuda",
    "name": "NVIDIA <H100> & friends",
    "threads": 4,
    "clock": "CUDA events",
    "cpu_isa": "avx512",
    "memory": "80 GiB",
}
VERSIONS = {"neox-kernels": "0.1.0", "torch": "2.13.0", "flash-attn": None}

# By op: kinds, shapes with their width, contenders (their role, and how many times as slow as the limit they are).
PEERS = {"transformers eager": ("peer", 5.5), "transformers compiled": ("peer", 1.6), "flash-attn": ("peer", 1.3)}
MEMCPY = {"memcpy": ("limit", 1.0)}
VARIANTS = {f"{OURS} in place": ("variant", 1.02), f"{OURS}, triton": ("variant", 1.25)}
OPS: dict[str, tuple[tuple[str, ...], dict[str, int], Mapping[str, tuple[str, float]]]] = {
    "rotary": (("forward", "append"), {"pythia-160m": 768, "pythia-1.4b": 2048}, {**PEERS, **VARIANTS, **MEMCPY}),
    "softmax": (
        ("forward", "backward"),
        {"heads-12": 9000},
        {**PEERS, "torch.softmax": ("peer", 0.9), "mine": ("added", 3.0), **MEMCPY},
    ),
    "varlen": (("unpad",), {"hidden-768": 768}, {"PyTorch indexing": ("peer", 2.6), **VARIANTS}),
    "gelu": (("forward",), {"gpt-j-6b": 16384}, {"torch gelu": ("peer", 1.4), EVIL: ("added", 2.0), **MEMCPY}),
    "attention": (("prefill",), {"gpt-j-6b": 4096}, {"sdpa": ("peer", 1.1), "flash-attn": ("peer", 1.0)}),
    "models": (
        ("logits",),
        {"pythia-70m": 512},
        {"transformers eager": ("peer", 1.9), "its matrix products alone": ("limit", 1.0)},
    ),
}
WITH_FLOPS = ("attention", "models")


def result(name: str, role: str, seconds: float, rounds: int, chance: random.Random) -> Result:
    return Result(name, role, tuple(seconds * chance.lognormvariate(0, 0.04) for _ in range(rounds)))


def made_up_case(
    op: str, kind: str, shape: str, batch: int, length: int, dtype: str, *, rounds: int = 7, seed: int = 0
) -> CaseRecord:
    """A case with a launch's time below which nothing gets, and above it what the contender's bandwidth allows."""
    _, shapes, contenders = OPS[op]
    chance = random.Random(f"{op} {kind} {shape} {batch} {length} {dtype} {seed}")
    size = 4 * batch * length * shapes[shape] * (4 if dtype == "float32" else 2)
    flops = size * 600 if op in WITH_FLOPS else 0
    best = 4e-6 + (flops / 4e14 if flops else size / 2.6e12)
    times = {OURS: ("ours", 1.1), **contenders}
    results = [result(name, role, slow * best + 6e-6, rounds, chance) for name, (role, slow) in times.items()]
    series = f"{kind} {shape} {dtype}, batch {batch}"
    absent = dict(ABSENT) if op == "varlen" else {}
    return CaseRecord(
        op, kind, shape, f"({batch}, {length})", length, series, dtype, size, flops, tuple(results), absent
    )


def made_up_cases(dtypes: Sequence[str], sizes: Sequence[tuple[int, int]], rounds: int = 7) -> Iterator[CaseRecord]:
    for op, (kinds, shapes, _) in OPS.items():
        for kind in kinds:
            for shape in shapes:
                for batch, length in sizes:
                    for dtype in dtypes:
                        yield made_up_case(op, kind, shape, batch, length, dtype, rounds=rounds)


def record_of(cases: Sequence[CaseRecord], *, complete: bool = True) -> Record:
    return Record(
        command="neox-kernels bench --json 'a <b>.json'",
        started="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        machine=dict(MACHINE),
        versions=dict(VERSIONS),
        cases=list(cases),
        seconds=754.2,
        complete=complete,
    )


SIZES = ((1, 1), (1, 128), (1, 2048), (8, 2048))


def made_up_record(*, complete: bool = True) -> Record:
    return record_of(list(made_up_cases(("float32", "bfloat16"), SIZES)), complete=complete)


def large_record() -> Record:
    """As many cases as a whole run has."""
    sizes = [(batch, 2**power) for batch in (1, 8) for power in range(13)]
    return record_of(list(made_up_cases(("bfloat16",), sizes, rounds=15)))
