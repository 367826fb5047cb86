"""The files of a checkpoint: found within its folder, opened, and replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What parameters may be, and what the files call it.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def local_folder(folder: str | Path) -> Path:
    """``folder``, which must be there.

    Raises:
        FileNotFoundError: it is not; a name on the Hub is none.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: name the folder that it lies in")
    raise FileNotFoundError(
        f"{path} is not there: a local folder is needed, and nothing is fetched. A model of the Hugging Face Hub comes "
        "into a folder by: hf download ORGANISATION/MODEL --local-dir FOLDER"
    )


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Names to write to in place of ``paths``, which become ``paths`` all together once everything is written.

    So what is under a final name is whole: from before, or new. After an error nothing is left behind.
    """
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        for written in temporary:
            written.touch()
        mode = temporary[0].stat().st_mode
        yield temporary
        for written in temporary:
            written.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        for written, path in zip(temporary, paths, strict=True):
            written.replace(path)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


@dataclass
class Stored:
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the file calls it: see DTYPES

    def read(self) -> Tensor:
        """The tensor, mapped. The file is opened for it alone: the pages that were read are given back with it."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, by its name."""
    stored: dict[str, Stored] = {}
    for path in _tensor_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in stored:
                    raise ValueError(f"{name} is in both {stored[name].path} and {path}")
                entry = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(entry.get_shape()), entry.get_dtype())
    return stored


def _tensor_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint, each there and within the folder."""
    if (folder / SINGLE_FILE).exists():
        return [_within(folder, SINGLE_FILE)]
    index = folder / INDEX_FILE
    if index.exists():
        paths = [_within(folder, name) for name in sorted(set(weight_map(index).values()))]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there, and {index} names it")
        return paths
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        raise ValueError(
            f"{folder} has its tensors in pickle files only ({pickles[0]}), which can run any code when they are read. "
            "If you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def weight_map(index: Path) -> dict[str, str]:
    """File of each tensor."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from None
    if not isinstance(found, dict) or not found or {type(name) for name in found.values()} != {str}:
        raise ValueError(f"{index} is no index of shards: its weight_map must name a file for every tensor")
    return found


def _within(folder: Path, name: str) -> Path:
    """The path of a file, which must lie in the folder, or in the cache of the Hub that the folder is a snapshot of."""
    root, path = folder.resolve(), folder / name
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if "\0" in name or not any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(f"{name!r} leads out of {folder}, and is not opened")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def import_safetensors() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install safetensors", name=error.name) from error
    return safetensors
