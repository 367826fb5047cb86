"""Which cases a run has, and which contenders take part in them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neox_kernels
from neox_kernels.bench import gpu
from neox_kernels.bench.case import DTYPES, Absent, Case, Family, Work
from neox_kernels.bench.harness import Call
from neox_kernels.bench.record import OURS

FAMILIES = ("rotary", "softmax", "varlen", "gelu", "attention", "models", "swap")
# Names of peers; "eager" is the one of each family that is plain PyTorch.
PEERS = (
    *("eager", "transformers", "transformers-4", "torch", "indexing", "sdpa", "compile"),
    *("flash-attn", "liger", "ctranslate2"),
)
SLOW = ("compile",)  # only where it is asked for
Function = Callable[..., Any]


@dataclass(frozen=True)
class Options:
    """What to time. An empty choice means all; of sizes and shapes, without ``full``, those of the short run.

    left_out: families that were not asked for and cannot run here, with the reason.
    grid: sizes in place of those that the families have.
    kinds: as the families name them; ``backward`` adds those that take gradients.
    backends: ours by the first, and by the others as variants; empty: by the one that serves.
    against: of PEERS; empty: all but the slow ones.
    added: the user's own functions, by family and name.
    """

    families: tuple[Family, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    device: str = "cpu"
    backends: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    added: tuple[tuple[str, str, Function], ...] = ()
    backward: bool = False
    full: bool = False


def one_of(what: str, names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """These names, once each. Raises ValueError for one that is not known."""
    chosen, known = tuple(dict.fromkeys(names)), tuple(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what}: {name} is not known; known are {', '.join(known)}")
    return chosen


def read_options(
    ops: Sequence[str],
    *,
    shape: str = "",
    grid: str = "",
    dtype: str = "",
    kind: str = "",
    device: str = "cpu",
    backend: str = "",
    against: str = "",
    add: Sequence[str] = (),
    backward: bool = False,
    full: bool = False,
) -> Options:
    """The options as the command has them, names separated by commas. Raises ValueError, "option: what is wrong"."""
    one_of("--device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda: torch sees no CUDA device here")
    families, left_out = [], {}
    for name in one_of("OPS", ops, FAMILIES) or FAMILIES:
        try:
            families.append(importlib.import_module(f"neox_kernels.bench.{name}_cases").FAMILY)
        except ModuleNotFoundError as error:
            if name in ops:
                raise ValueError(f"OPS: {name} needs {error.name}, which is not installed") from error
            left_out[name] = f"{error.name} is not installed"
    return Options(
        families=tuple(families),
        left_out=left_out,
        shapes=one_of("--shape", _words(shape), dict.fromkeys(x for family in families for x in family.shapes)),
        grid=read_grid(_words(grid), families),
        dtypes=one_of("--dtype", _words(dtype), DTYPES),
        kinds=one_of("--kind", _words(kind), dict.fromkeys(x for family in families for x in family.works)),
        device=device,
        backends=read_backends(_words(backend), families, device),
        against=one_of("--against", _words(against), PEERS),
        added=read_added(add, [family.name for family in families]),
        backward=backward,
        full=full,
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def read_grid(words: Sequence[str], families: Sequence[Family]) -> tuple[tuple[int, ...], ...]:
    """Sizes as "4x512". Raises ValueError for what is none, or none of these families'."""
    sizes = []
    for word in words:
        parts = word.split("x")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--grid: {word} is not sizes above 0 with x between them, such as 4x512")
        for family in families:
            if len(parts) != len(family.size_names):
                raise ValueError(f"--grid: {word} is not {'x'.join(family.size_names)}, which {family.name} takes")
        sizes.append(tuple(map(int, parts)))
    return tuple(sizes)


def read_backends(words: Sequence[str], families: Sequence[Family], device: str) -> tuple[str, ...]:
    """Raises ValueError for a backend that cannot serve one of the families."""
    names = one_of("--backend", words, ("compiled", "triton", "reference"))
    for family in families:
        reasons = neox_kernels.explain(family.op, torch_device(device))[0].reasons
        for name in names:
            if name in reasons and not reasons[name].endswith("comes first"):
                raise ValueError(f"--backend: {name} does not serve {family.op} here: {reasons[name]}")
    return names


def read_added(words: Sequence[str], families: Sequence[str]) -> tuple[tuple[str, str, Function], ...]:
    """Functions as "module:function", or "family=module:function" where there are several families; the module may lie
    in the working directory. Raises ValueError where there is no such function."""
    found = []
    for word in words:
        family, equals, path = word.rpartition("=")
        if not equals and len(families) != 1:
            raise ValueError(f"--add: {word} does not say of which op it is: give one op, or --add OP={word}")
        one_of("--add", [family] if equals else [], families or FAMILIES)
        module, colon, name = path.partition(":")
        if not (module and colon and name):
            raise ValueError(f"--add: {path} is not module:function")
        sys.path.insert(0, str(Path.cwd()))
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--add: {path}: {error}") from error
        finally:
            sys.path.pop(0)
        if not callable(function):
            raise ValueError(f"--add: {path} is a {type(function).__name__}, and must be a function")
        found.append((family if equals else families[0], name, function))
    return tuple(found)


def torch_device(device: str) -> str:
    return gpu.DEVICE if device == "cuda" else device


def choose(options: Options) -> list[tuple[Family, Case]]:
    """The cases of a run. Raises ValueError where the options leave none."""

    def wanted(family: Family, case: Case) -> bool:
        if options.kinds:
            if case.kind not in options.kinds:
                return False
        elif case.kind in family.backward and not options.backward:
            return False
        if options.shapes:
            return case.shape in options.shapes
        return bool(options.full or options.grid) or family.quick(case)

    cases = [
        (family, case)
        for family in options.families
        for case in family.cases(torch_device(options.device), grid=options.grid, dtypes=options.dtypes)
        if wanted(family, case)
    ]
    if not cases:
        raise ValueError("OPS: these options leave no case")
    return cases


@dataclass
class Field:
    """Who takes part in a case: its work, calls and roles by name, checked; and who does not, and why.

    wrong: ours or a user's own, whose numbers are not right or that failed; they are among ``absent`` too.
    """

    work: Work
    calls: dict[str, Call] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def enter(self, name: str, role: str, call: Call, check: bool = True) -> None:
        """Raises AssertionError where the result is wrong."""
        result = call()
        if check:
            self.work.check(result)
        self.calls[name], self.roles[name] = call, role

    def refuse(self, name: str, error: Exception) -> None:
        text = str(error).strip() or "no reason given"
        if isinstance(error, ModuleNotFoundError):
            text = f"{error.name} is not installed"
        known = isinstance(error, Absent | AssertionError | ModuleNotFoundError)
        self.absent[name] = text if known else f"{type(error).__name__}: {text}"


def contenders(family: Family, case: Case, options: Options) -> Field:
    """Everyone of a case, each called once and checked before anything is timed."""
    work = family.work(case)
    entered = Field(work)
    first, *others = options.backends or (None,)
    try:
        entered.enter(OURS, "ours", by_backend(work.ours(), first))
        for name, call in work.variants().items():
            entered.enter(name, "variant", by_backend(call, first))
        for backend in others or _also_serving(family, options):
            entered.enter(f"{OURS}, {backend}", "variant", by_backend(work.ours(), backend))
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        entered.refuse(OURS, error)
        entered.wrong.append(OURS)
        return entered
    for name, make in work.peers().items():
        if not _asked_for(name, family, options):
            continue
        try:
            # What leaves the masks out is said by its name, and checked where it is made.
            entered.enter(name, "peer", make(), check=not name.endswith("no mask"))
        except (ImportError, Absent, AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            entered.refuse(name, error)
    for name in options.against:
        if name != "eager" and name not in (peer.partition(",")[0] for peer in work.peers()):
            entered.absent[name] = "it has nothing of this kind"
    for owner, name, function in options.added:
        if owner == family.name and work.signature:
            try:
                _leave_alone(work, work.call_of(function))
                entered.enter(name, "added", work.call_of(function))
            except Exception as error:  # whatever a user's code may raise
                hint = "" if isinstance(error, AssertionError) else f" It is called as {work.signature}"
                entered.refuse(name, AssertionError(f"{type(error).__name__}: {error}{hint}"))
                entered.wrong.append(name)
    for name, call in work.limits().items():
        entered.enter(name, "limit", call, check=False)
    return entered


def _leave_alone(work: Work, call: Call) -> None:
    """Raises AssertionError where the call changes the arguments; they are as before then."""
    given = [x for arg in work.args for x in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(x, Tensor)]
    pairs = [(x, x.detach().clone()) for x in given]
    call()
    changed = [(x, before) for x, before in pairs if not torch.equal(x, before)]
    with torch.no_grad():
        for x, before in changed:
            x.copy_(before)
    if changed:
        raise AssertionError("it changes its arguments, which the others share")


def by_backend(call: Call, backend: str | None) -> Call:
    if backend is None:
        return call

    def forced() -> object:
        with neox_kernels.use_backend(backend):
            return call()

    return forced


def _also_serving(family: Family, options: Options) -> list[str]:
    """On a GPU the backends that could serve, were it not for the first."""
    if options.device == "cpu" or options.backends:
        return []
    reasons = neox_kernels.explain(family.op, torch_device(options.device))[0].reasons
    return [name for name, why in reasons.items() if why.endswith("comes first") and name != "reference"]


def _asked_for(peer: str, family: Family, options: Options) -> bool:
    name = peer.partition(",")[0]
    if not options.against:
        return name not in SLOW
    return name in options.against or ("eager" in options.against and name == family.eager)
