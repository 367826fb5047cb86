"""Checkpoints of models: what is written here and in transformers is read in either, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, NEOX, assert_same_parameters, randomize, their_config, their_model

from neox_kernels import models

INDEX = "model.safetensors.index.json"
each_class = pytest.mark.parametrize("name", CLASSES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_size = pytest.mark.parametrize("shard_bytes", [10**9, 12_000], ids=["single", "sharded"])


def our_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    return randomize(getattr(models, name)(their_config(name, **changes)))


def load_there(name: str, folder: Path) -> Any:
    model, info = getattr(transformers, name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(1, 12), return_dict=False)[0]


# --------------------------------------------------------------------------------------------------------- both ways


@each_size
@each_dtype
@each_class
def test_what_transformers_saves_loads_here(name: str, dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    theirs = their_model(name, dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    ours = getattr(models, name).from_pretrained(tmp_path)
    assert_same_parameters(ours, theirs)
    assert not ours.training and not any(parameter.is_meta for parameter in ours.parameters())


@each_size
@each_dtype
@each_class
def test_what_is_saved_here_loads_there(name: str, dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    ours = our_model(name).to(dtype)
    ours.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    theirs = load_there(name, tmp_path)
    assert_same_parameters(ours, theirs)
    assert theirs.config.architectures == [name]
    assert_same_parameters(getattr(models, name).from_pretrained(tmp_path), ours)


def test_a_class_that_transformers_lacks(tmp_path: Path) -> None:
    ours = our_model("GPTJForTokenClassification")
    ours.save_pretrained(tmp_path)
    assert_same_parameters(models.GPTJForTokenClassification.from_pretrained(tmp_path), ours)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("GPTNeoXForCausalLM", {}), ("GPTNeoXForCausalLM", {"rope_parameters": YARN}), ("GPTJForCausalLM", {})],
)
def test_a_loaded_model_computes_what_the_saved_one_does(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The tables of positions are in no file, and come whole out of the construction without data."""
    ours = our_model(name, **changes).eval()
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(getattr(models, name).from_pretrained(tmp_path)), logits(ours))


# ------------------------------------------------------------------------------------------------------- old names


def old_buffers(layer: str, attention: str) -> dict[str, Tensor]:
    return {
        f"{layer}.{attention}.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        f"{layer}.{attention}.masked_bias": torch.tensor(-1e9),
        f"{layer}.{attention}.rotary_emb.inv_freq": torch.ones(4),
        f"{layer}.{attention}.embed_positions": torch.ones(64, 4),
        "rotary_emb.inv_freq": torch.ones(4),
    }


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("head", ["embed_out.", "lm_head."])
def test_names_of_gpt_neox(head: str, tmp_path: Path) -> None:
    ours = our_model("GPTNeoXForCausalLM")
    ours.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    buffers = old_buffers("gpt_neox.layers.0", "attention")
    rewrite(tmp_path, lambda file: {name.replace("embed_out.", head): x for name, x in file.items()} | buffers)
    assert_same_parameters(models.GPTNeoXForCausalLM.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize(("family", "prefix"), [("GPTNeoX", "gpt_neox."), ("GPTJ", "transformer.")])
def test_the_prefix(family: str, prefix: str, tmp_path: Path) -> None:
    ours, headless = our_model(f"{family}ForCausalLM"), getattr(models, f"{family}Model")
    ours.save_pretrained(tmp_path)
    buffers = old_buffers("h.1", "attn")
    assert_same_parameters(headless.from_pretrained(tmp_path), ours.decoder)  # its head is left aside
    rewrite(tmp_path, lambda file: {name.removeprefix(prefix): x for name, x in file.items()} | buffers)
    assert_same_parameters(type(ours).from_pretrained(tmp_path), ours)
    assert_same_parameters(headless.from_pretrained(tmp_path), ours.decoder)


def test_a_headless_checkpoint_lacks_the_head(tmp_path: Path) -> None:
    our_model("GPTJModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPTJForCausalLM: 2 missing: lm_head\.weight, lm_head\.bias$"):
        models.GPTJForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------- tied


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    theirs, here, there = their_model(name, tie_word_embeddings=True), tmp_path / "here", tmp_path / "there"
    theirs.save_pretrained(there)
    ours = getattr(models, name).from_pretrained(there)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert_same_parameters(ours, theirs)
    ours.save_pretrained(here)
    assert not {"lm_head.weight", "embed_out.weight"} & load_file(here / "model.safetensors").keys()
    assert_same_parameters(load_there(name, here), theirs)


def test_a_tied_head_in_the_file(tmp_path: Path) -> None:
    ours = our_model("GPTNeoXForCausalLM", tie_word_embeddings=True)
    ours.save_pretrained(tmp_path)
    embedding = ours.gpt_neox.embed_in.weight.detach()
    rewrite(tmp_path, lambda file: file | {"embed_out.weight": embedding.clone()})
    assert_same_parameters(models.GPTNeoXForCausalLM.from_pretrained(tmp_path), ours)
    rewrite(tmp_path, lambda file: {name: x for name, x in file.items() if "embed_in" not in name})
    loaded = models.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert_same_parameters(loaded, ours)
    assert loaded.lm_head.weight is loaded.gpt_neox.embed_in.weight
    rewrite(tmp_path, lambda file: file | {"gpt_neox.embed_in.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"differ, and are one parameter .* set tie_word_embeddings to false"):
        models.GPTNeoXForCausalLM.from_pretrained(tmp_path)


def test_ties_of_which_the_configuration_knows_nothing(tmp_path: Path) -> None:
    ours = our_model("GPTNeoXForCausalLM")
    ours.lm_head.weight = ours.gpt_neox.embed_in.weight
    ours.save_pretrained(tmp_path)
    theirs = load_there("GPTNeoXForCausalLM", tmp_path)
    assert torch.equal(theirs.get_output_embeddings().weight, ours.lm_head.weight)
    ours.config.tie_word_embeddings = True
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie_word_embeddings of the configuration is True"):
        ours.save_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- how it is loaded


def test_dtype_and_device(tmp_path: Path) -> None:
    ours = our_model("GPTNeoXModel")
    ours.save_pretrained(tmp_path)
    loaded = models.GPTNeoXModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_parameters(loaded, ours.to(torch.bfloat16))
    assert {p.device.type for p in models.GPTNeoXModel.from_pretrained(tmp_path, device="meta").parameters()} == {
        "meta"
    }


def test_no_weight_is_made_to_be_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    our_model("GPTJForCausalLM").save_pretrained(tmp_path)
    filled = []
    monkeypatch.setattr(nn.init, "normal_", lambda x, *args, **options: filled.append(x.device.type))
    before = torch.get_rng_state()
    models.GPTJForCausalLM.from_pretrained(tmp_path)
    assert set(filled) == {"meta"} and torch.equal(torch.get_rng_state(), before)


MEASURE = """
import resource, sys
from pathlib import Path
from neox_kernels.models import GPTNeoXModel

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

small, large = sys.argv[1:]
GPTNeoXModel.from_pretrained(small)  # whatever is needed once
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
model = GPTNeoXModel.from_pretrained(large)
print(memory("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_the_peak_is_one_model_and_one_tensor(tmp_path: Path) -> None:
    our_model("GPTNeoXModel").save_pretrained(tmp_path / "small")
    wide = {**NEOX, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    models.GPTNeoXModel(wide).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-P", "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    peak, model = map(int, run.stdout.split())
    largest = 4 * 4096 * 1024
    assert model > 200e6
    assert 0.9 * model < peak < model + 2 * largest  # twice: half of it is slack


def test_not_strict(tmp_path: Path) -> None:
    ours = our_model("GPTJForCausalLM", initializer_range=0.001)
    ours.save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda file: {n: x for n, x in file.items() if n != "transformer.ln_f.bias"} | {"x": torch.ones(1)}
    )
    with pytest.warns(UserWarning) as warned:
        loaded = models.GPTJForSequenceClassification.from_pretrained(tmp_path, strict=False, dtype=torch.bfloat16)
    (text,) = (str(entry.message) for entry in warned)
    assert "2 missing, and initialised: transformer.ln_f.bias, score.weight" in text
    assert "3 left aside: lm_head" in text and "x" in text
    assert torch.equal(loaded.transformer.ln_f.bias, torch.zeros(32, dtype=torch.bfloat16))
    assert torch.equal(loaded.transformer.ln_f.weight, ours.transformer.ln_f.weight.bfloat16())
    assert 0 < loaded.score.weight.abs().max() < 0.01
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert warned[0].filename == __file__


def test_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    """There the files are links to blobs beside the folder."""
    ours, snapshot, blobs = our_model("GPTNeoXModel"), tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    ours.save_pretrained(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("..", "..", "blobs", "abc"))
    assert_same_parameters(models.GPTNeoXModel.from_pretrained(snapshot), ours)


# -------------------------------------------------------------------------------------------------------------- saving


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_earlier_checkpoint_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    ours = our_model("GPTNeoXModel")
    ours.save_pretrained(folder, max_shard_bytes=8_000)
    outside, foreign = tmp_path / "model-00001-of-00009.safetensors", folder / "model-00001-of-00007.safetensors"
    outside.write_text("mine")
    foreign.write_text("mine")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = "../model-00001-of-00009.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    shards = {name for name in files(folder) if name.startswith("model-")} - {foreign.name}
    assert len(shards) > 3
    assert all((folder / name).stat().st_size < 8_000 + 6_000 for name in shards)  # the names of tensors take space too

    ours.save_pretrained(folder)
    assert files(folder) == {"config.json", "model.safetensors", foreign.name}
    assert outside.exists()
    ours.save_pretrained(folder, max_shard_bytes=30_000)
    assert INDEX in files(folder) and "model.safetensors" not in files(folder)
    assert {path.stat().st_mode for path in folder.iterdir()} == {foreign.stat().st_mode}
    assert_same_parameters(models.GPTNeoXModel.from_pretrained(folder), ours)


def test_an_error_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = our_model("GPTNeoXModel")
    ours.save_pretrained(tmp_path, max_shard_bytes=30_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saved = []

    def full(tensors: Any, path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        saved.append(path)
        if len(saved) == 2:
            raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    randomize(ours)
    with pytest.raises(OSError, match="no space left"):
        ours.save_pretrained(tmp_path, max_shard_bytes=30_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parameters_that_are_views_are_saved(tmp_path: Path) -> None:
    ours = our_model("GPTNeoXModel")
    transposed = torch.randn(32, 96).t()
    ours.embed_in.weight = nn.Parameter(transposed)
    ours.save_pretrained(tmp_path)
    assert torch.equal(models.GPTNeoXModel.from_pretrained(tmp_path).embed_in.weight, transposed)
