"""Checkpoints that cannot be loaded, and requests that cannot be met: what the errors say, and that they come first."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from neox_kernels.models import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

CONFIG = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One checkpoint in one file."""
    GPTNeoXModel(CONFIG).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    GPTNeoXModel(CONFIG).save_pretrained(tmp_path / "sharded", max_shard_bytes=1500)
    return tmp_path / "sharded"


def name_shard(folder: Path, name: object) -> None:
    """Let the index name this file for one tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["embed_in.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path | str, kind: type[Exception], text: str, **options: Any) -> None:
    with pytest.raises(kind, match=text):
        GPTNeoXModel.from_pretrained(folder, **options)


# ------------------------------------------------------------------------------------------------------------- tensors


def test_everything_that_does_not_fit_is_in_one_error(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    tensors["final_layer_norm.weight"] = torch.ones(3)
    tensors |= {f"extra.{i}": torch.ones(1) for i in range(10)}
    del tensors["embed_in.weight"], tensors["layers.0.mlp.dense_h_to_4h.bias"]
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError) as caught:
        GPTNeoXModel.from_pretrained(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder} does not fit GPTNeoXModel: 2 missing: embed_in.weight, layers.0.mlp")
    assert "; 10 unexpected: extra.0, " in text and "extra.7 and 2 more; " in text and "extra.8" not in text
    assert text.endswith("1 of another shape: final_layer_norm.weight is (3,), not (16,)")
    refused(folder, ValueError, "GPTNeoXModel: 1 of another shape", strict=False)


def test_another_head(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight$"):
        GPTNeoXForCausalLM.from_pretrained(folder)


def test_tensors_that_are_not_floating(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    save_file(tensors | {"embed_in.weight": torch.ones(16, 16, dtype=torch.int8)}, folder / FILE)
    refused(folder, ValueError, r"embed_in.weight in .*model.safetensors is I8: only F32, F16, BF16, F64")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*"))[0]
    save_file(load_file(first), sharded / "again.safetensors")
    name_shard(sharded, "again.safetensors")
    refused(sharded, ValueError, "embed_in.weight is in both .*again.safetensors and .*model-00001")


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..", "a/../../outside.safetensors", "a\0b"]
)
def test_a_shard_outside_the_folder(name: str, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("safetensors.safe_open", lambda *args, **options: opened.append(args))
    name_shard(sharded, name)
    refused(sharded, ValueError, "leads out of .* and is not opened")
    assert not opened


@pytest.mark.parametrize("name", [FILE, "link.safetensors"])
def test_a_link_out_of_the_folder(name: str, folder: Path, sharded: Path) -> None:
    secret = folder.parent / "secret.safetensors"
    (folder / FILE).rename(secret)
    target = folder if name == FILE else sharded
    (target / name).symlink_to(secret)
    if name != FILE:
        name_shard(target, name)
    refused(target, ValueError, f"'{name}' leads out of")


def test_a_link_within_the_folder(folder: Path) -> None:
    (folder / FILE).rename(folder / "there")
    (folder / FILE).symlink_to("there")
    GPTNeoXModel.from_pretrained(folder)


def test_a_missing_shard(sharded: Path) -> None:
    name_shard(sharded, "model-00099-of-00099.safetensors")
    refused(sharded, FileNotFoundError, "model-00099-of-00099.safetensors is not there, and .*index.json names it")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', b"\xff\xfe", "null"],
)
def test_a_broken_index(text: str | bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(sharded, ValueError, f"{re.escape(str(sharded / INDEX))} is no index of shards")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_off(keep: int, folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:keep])
    refused(folder, ValueError, f"{re.escape(str(folder / FILE))} is no whole safetensors file")


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 166029852\n")
    refused(folder, ValueError, f"{re.escape(str(folder / FILE))} is no whole safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickle_files(name: str, folder: Path) -> None:
    (folder / FILE).rename(folder / name)
    refused(folder, ValueError, rf"pickle files only \({name}\).*save_pretrained\(NEW_FOLDER\) writes safetensors")


def test_a_folder_without_tensors(folder: Path) -> None:
    (folder / FILE).unlink()
    refused(folder, FileNotFoundError, "has neither model.safetensors nor model.safetensors.index.json")


def test_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("EleutherAI/pythia-70m", FileNotFoundError, "EleutherAI/pythia-70m is not there.*hf download")
    with pytest.raises(FileNotFoundError, match="hf download"):
        GPTNeoXConfig.from_pretrained("EleutherAI/pythia-70m")
    refused(folder / FILE, NotADirectoryError, "is a file: name the folder")
    (folder / "config.json").unlink()
    refused(folder, FileNotFoundError, "config.json")


# ------------------------------------------------------------------------------------------------------------ requests


def test_arguments_of_loading(folder: Path) -> None:
    refused(folder, ValueError, "dtype must be one of .*, not torch.int8", dtype=torch.int8)
    refused(folder, ValueError, "dtype must be one of .*, not 'float32'", dtype="float32")
    refused(folder, RuntimeError, "device", device="nowhere")


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("5GB", TypeError)])
def test_arguments_of_saving(size: Any, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind, match="max_shard_bytes must be"):
        GPTNeoXModel(CONFIG).save_pretrained(tmp_path / "new", max_shard_bytes=size)
    assert not (tmp_path / "new").exists()


def test_a_model_without_data_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPTNeoXModel(CONFIG)
    with pytest.raises(ValueError, match=r"parameters without data: 15 on meta: embed_in.weight, .* and 7 more"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_safetensors_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(folder, ModuleNotFoundError, "pip install safetensors")
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        GPTNeoXModel(CONFIG).save_pretrained(folder)
