"""The design's rules that a reader would have to trust otherwise: who imports whom, sizes, docstrings, environment."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import neox_kernels

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"neox_kernels": ROOT / "neox_kernels", **{name: ROOT / name for name in ("kernels", "models", "bench")}}


def dotted(name: str, path: Path) -> str:
    prefix = "neox_kernels" if name == "neox_kernels" else f"neox_kernels.{name}"
    return ".".join((prefix, *path.relative_to(FOLDERS[name]).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {dotted(name, path): path for name, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))}

# What a module may import of others, by the longest of these names that it is or lies in (design, section 2). API is
# what the package offers: its public names, backends and testing. All may import the standard library.
API = {"torch", "neox_kernels"}
ATTENTION = {f"neox_kernels.{name}" for name in ("attention_implementations", "attention_masks", "flash_attention")}
MAY_IMPORT: dict[str, set[str]] = {
    "neox_kernels": {
        "torch",
        "neox_kernels.attention",
        "neox_kernels.attention_masks",
        "neox_kernels.backends",
        "neox_kernels.nn",
        "neox_kernels.ops",
        "neox_kernels.integrations",
    },
    "neox_kernels.reference": {"torch", "neox_kernels.reference"},
    "neox_kernels.checks": {"torch", "neox_kernels.checks"},
    "neox_kernels.testing": {"torch"},
    "neox_kernels.memory": {"torch"},
    "neox_kernels.backends": set(),
    "neox_kernels.compiled": {"torch", "neox_kernels.compiled"},
    "neox_kernels.kernels": {"torch", "triton", "neox_kernels.kernels"},
    "neox_kernels.ops": {"torch", *(f"neox_kernels.{name}" for name in ("backends", "checks", "reference", "ops"))},
    "neox_kernels.nn": {"torch", "neox_kernels.ops"},
    "neox_kernels.attention": {"torch", "neox_kernels.checks", *ATTENTION},
    "neox_kernels.attention_implementations": {"torch", "neox_kernels.memory", "neox_kernels.ops", *ATTENTION},
    "neox_kernels.attention_masks": {"torch", "neox_kernels.checks", "neox_kernels.ops"},
    "neox_kernels.flash_attention": {"torch", "neox_kernels.ops", "neox_kernels.attention_masks"},
    "neox_kernels.models": {
        *API,
        "neox_kernels.attention",
        "neox_kernels.memory",
        "neox_kernels.models",
        "safetensors",
    },
    "neox_kernels.integrations": {
        *API,
        *(f"neox_kernels.{name}" for name in ("attention", "integrations", "models")),
        "transformers",
    },
    # These two also report what the compiled library has.
    "neox_kernels.demo": {*API, "neox_kernels.models", "neox_kernels.compiled", "transformers", "rich"},
    "neox_kernels.kernel_report": {*API, "neox_kernels.kernels", "neox_kernels.kernel_report", "triton", "rich"},
    "neox_kernels.bench": {
        *API,
        *(
            f"neox_kernels.{name}"
            for name in ("attention", "bench", "compiled", "info", "kernels", "models", "reference")
        ),
        *("jinja2", "markupsafe", "matplotlib", "pytest", "rich"),
        *("ctranslate2", "flash_attn", "liger_kernel", "numpy", "transformers"),  # peers
    },
    "neox_kernels.info": {*API, "neox_kernels.compiled", "rich"},
    "neox_kernels.text": {"torch", "tokenizers", "neox_kernels.models"},
    "neox_kernels.cli": {
        *API,
        *(f"neox_kernels.{name}" for name in ("bench", "demo", "info", "kernel_report", "models", "text")),
        "typer",
        "rich",
    },
    "neox_kernels.__main__": {"neox_kernels.cli"},
}
# Only where a function runs, or for type checkers: whoever imports the package has not asked for them ...
LAZY = ("integrations", "bench", "cli", "demo", "info", "models", "kernels", "kernel_report", "text")
OPTIONAL = ("transformers", "triton", "flash_attn", "matplotlib", "safetensors", "tokenizers", "typer", "rich", "numpy")
# ... but where they are asked for.
ASKED_FOR = tuple(f"neox_kernels.{name}" for name in (*LAZY, "__main__"))


def rule_of(module: str) -> str:
    """The longest name in MAY_IMPORT that the module is, or lies in."""
    parts = module.split(".")
    while ".".join(parts) not in MAY_IMPORT:
        parts.pop()
    return ".".join(parts)


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that this one imports, and whether only once a function runs (or for type checkers)."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES or node.module == "neox_kernels" else node.module), lazy
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or guarded or isinstance(node, ast.FunctionDef | ast.Lambda))

    yield from visit(ast.parse(MODULES[module].read_text()), False)


def permitted(imported: str, allowed: set[str]) -> bool:
    if imported.split(".")[0] in sys.stdlib_module_names:
        return True
    if "neox_kernels" in allowed and imported.startswith("neox_kernels"):
        public = ("neox_kernels", "neox_kernels.backends", "neox_kernels.testing")
        if (
            imported in public or imported not in MODULES
        ):  # a name of the package, as in `from neox_kernels import swap`
            return True
    return any(imported == one or imported.startswith(f"{one}.") for one in allowed - {"neox_kernels"})


@pytest.mark.parametrize("module", MODULES)
def test_who_imports_whom(module: str) -> None:
    own = rule_of(module)
    assert own != "neox_kernels" or module == own, f"{module} has no line in MAY_IMPORT"
    for imported, lazy in imports(module):
        assert permitted(imported, MAY_IMPORT[own]), f"{module} imports {imported}"
        heavy = imported.startswith((*OPTIONAL, *(f"neox_kernels.{name}" for name in LAZY)))
        assert lazy or not heavy or own in ASKED_FOR, f"{module} imports {imported} before anyone asked for it"


def test_the_walk_sees_imports() -> None:
    found = set(imports("neox_kernels"))
    assert ("torch", False) in found and ("neox_kernels.backends", False) in found
    assert ("neox_kernels.integrations.transformers", True) in found or ("neox_kernels.integrations", True) in found
    assert {name for name, _ in imports("neox_kernels.ops.rotary")} >= {"neox_kernels.checks.rotary", "torch", "typing"}
    assert not permitted("neox_kernels.ops.rotary", MAY_IMPORT["neox_kernels.checks"]) and permitted("json", set())


def test_backends_are_named_as_strings() -> None:
    for name in neox_kernels.backends.MODULES.values():
        assert name in MODULES
        assert not any(imported == name for imported, _ in imports("neox_kernels.backends"))


SOURCES = [
    path
    for folder in ("neox_kernels", "kernels", "models", "csrc", "tests", "bench")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


def test_files_are_small() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [*SOURCES, ROOT / "setup.py"]
    }
    assert len(lengths) > 20
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    assert sorted(lengths.values())[len(lengths) // 2] < 200, "the median file"


@pytest.mark.parametrize("name", neox_kernels.__all__)
def test_public_docstrings(name: str) -> None:
    thing = getattr(neox_kernels, name)
    text = inspect.getdoc(thing) or ""
    assert len(text.splitlines()[0]) > 20 if text else False, f"{name} says nothing of itself"
    signature = inspect.signature(thing)
    if len(signature.parameters) > 2:
        assert "Args:" in text
        arguments = text[text.index("Args:") :]
        for parameter in signature.parameters:
            assert re.search(rf"\b{parameter}\b", arguments), f"{name} does not explain {parameter}"
    if inspect.isclass(thing):
        for method_name, method in inspect.getmembers(thing, inspect.isfunction):
            if not method_name.startswith("_") and method.__qualname__.startswith(thing.__qualname__):
                public = method_name != "extra_repr"  # torch's own
                assert inspect.getdoc(method) or not public, f"{name}.{method_name}"
        return
    if signature.return_annotation not in ("None", None) and len(signature.parameters) > 2:
        assert "Returns:" in text
    if "raise " in inspect.getsource(thing):
        assert "Raises:" in text


def test_one_environment_variable_is_read_at_run_time() -> None:
    read = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript | ast.Call | ast.Attribute | ast.Name):
                text = ast.unparse(node)
                if re.match(r"(os\.)?(environ|getenv)\b", text) and isinstance(node, ast.Subscript | ast.Call):
                    read.update(re.findall(r"[\"'](\w+)[\"']", text) or [text])
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert not {alias.name for alias in node.names} & {"environ", "getenv"}, (
                    f"{path}: import os, not from it"
                )
    assert read == {"NEOX_KERNELS_BACKEND"}
    for path in SOURCES:
        if path.suffix in (".cpp", ".h", ".cu"):
            assert "getenv" not in path.read_text(), path


# In headers of these nothing is defined that two instruction sets could share a copy of.
PLAIN_C = {"cstdint", "cstring", "cstddef", "immintrin.h", "arm_neon.h"}


def included(path: Path, default: bool, seen: set[Path]) -> Iterator[str]:
    """What a pass over a CPU source includes, into our own headers; `default`: with NEOX_CPU_DEFAULT defined."""
    seen.add(path)
    conditions: list[bool] = []
    for line in path.read_text().splitlines():
        directive = re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif|include)\b\s*(.*)", line)
        if not directive:
            continue
        word, rest = directive.groups()
        if word in ("if", "ifdef", "ifndef"):
            conditions.append(default if rest.strip() in ("defined(NEOX_CPU_DEFAULT)", "NEOX_CPU_DEFAULT") else True)
        elif word in ("elif", "else"):
            conditions[-1] = True
        elif word == "endif":
            conditions.pop()
        elif all(conditions):
            name = rest.strip()[1:-1] if rest[0] in '<"' else rest
            ours = next((base / name for base in (path.parent, ROOT / "csrc") if (base / name).is_file()), None)
            if ours is None:
                yield name.split(">")[0]
            elif ours not in seen:
                yield from included(ours, default, seen)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_no_instruction_set_sees_a_cpp_header(source: Path) -> None:
    """The linker keeps one copy of an inline function; were it the AVX-512 one, older processors would crash in it."""
    assert set(included(source, False, set())) <= PLAIN_C
    with_default = set(included(source, True, set()))
    assert any(name.startswith("torch/") for name in with_default), "the walk sees nothing"
