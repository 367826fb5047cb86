"""What a run measured, as ``neox-kernels bench --json`` writes it and the report reads it.

All contenders of a case are called once in every round, so their samples pair up: a ratio is taken within a round, and
its spread is the quartiles over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
OURS = "neox_kernels"


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    low: float
    middle: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Result:
    """One contender's samples.

    role: "ours" (the call that the others are compared with), "variant" (ours by another backend, in place, ...),
        "peer" (others' code), "added" (the user's own), or "limit" (what the machine can do: memcpy of the same bytes,
        or the matrix products alone).
    samples: seconds per call, one for each round.
    """

    name: str
    role: str
    samples: tuple[float, ...]

    @property
    def seconds(self) -> Spread:
        return Spread.of(list(self.samples))


@dataclass(frozen=True)
class CaseRecord:
    """One case: the same work done by every contender.

    op, kind: "rotary", "forward".
    shape: the model or heads it is taken from ("pythia-160m").
    size: the rest of the shape, for people ("(4, 512)").
    length: tokens, or keys: what time grows with among the cases of the same ``series``.
    series: cases that differ in length alone share it ("forward pythia-160m float32, batch 4").
    bytes: that must be read and written.
    flops: floating-point operations of the matrix products; 0 where memory bounds the op.
    absent: why a contender that was asked for is not among the results, by name.
    """

    op: str
    kind: str
    shape: str
    size: str
    length: int
    series: str
    dtype: str
    bytes: int
    flops: int
    results: tuple[Result, ...]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Result:
        return next(result for result in self.results if result.role == "ours")

    @property
    def limit(self) -> Result | None:
        return next((result for result in self.results if result.role == "limit"), None)

    @property
    def title(self) -> str:
        return f"{self.op} {self.kind}: {self.shape} {self.size} {self.dtype}"

    def ratio(self, result: Result) -> Spread:
        """How many times as fast as ``result`` ours is: above 1, ours is faster."""
        return Spread.of([other / own for other, own in zip(result.samples, self.ours.samples, strict=True)])

    def rate(self, result: Result) -> float:
        """FLOP per second where the case has ``flops``, bytes per second where not."""
        return (self.flops or self.bytes) / result.seconds.middle


@dataclass
class Record:
    """A whole run.

    complete: False where it was interrupted: the cases until then are there.
    wrong: what was not timed since its numbers are wrong, ours or a user's own: the reasons.
    machine: "device" (cpu or cuda), "name", "threads", "clock", "cpu_isa" and what else is known of it.
    versions: by distribution; None where it is not installed.
    """

    command: str
    started: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str | None]
    cases: list[CaseRecord] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    def rows(self) -> Iterator[tuple[CaseRecord, Result]]:
        return ((case, result) for case in self.cases for result in case.results)

    def write(self, path: Path) -> None:
        """In one step: a reader finds the old file or the new one, never half of one."""
        whole = {"format": FORMAT, **asdict(self)}
        for case in whole["cases"]:
            for result in case["results"]:
                result["samples"] = [float(f"{seconds:.5g}") for seconds in result["samples"]]
        text = json.dumps(whole, separators=(",", ":"))
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)

    @staticmethod
    def read(path: Path) -> Record:
        """Raises ValueError where the file is no record of this format."""
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no record of neox-kernels bench of format {FORMAT}")
        cases = []
        for case in data.pop("cases"):
            results = (Result(x["name"], x["role"], tuple(x["samples"])) for x in case.pop("results"))
            cases.append(CaseRecord(**case, results=tuple(results)))
        return Record(**data, cases=cases)
