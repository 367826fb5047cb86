"""Checkpoints in the files of Hugging Face, read and written with safetensors; and live models of transformers."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from neox_kernels.models.configuration import CONFIG_FILE
from neox_kernels.models.files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Stored,
    import_safetensors,
    local_folder,
    replacing,
    stored_tensors,
    weight_map,
)
from neox_kernels.models.names import listed, match, their_name

if TYPE_CHECKING:
    from neox_kernels.models.base import PretrainedModel

Model = TypeVar("Model", bound="PretrainedModel")

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    cls: type[Model],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Model:
    """Load a checkpoint, tensor by tensor: memory for the model and one tensor is needed, and no weight is made first.

    Read are ``config.json`` and ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.
    Names may be those of any version of transformers, with the decoder's prefix or without. Left aside are constants
    that old versions stored (``attention.bias``, ``rotary_emb.inv_freq`` and the like), and any head where ``cls`` has
    none. The model comes in evaluation mode.

    Args:
        folder: local. Its tensors lie in it, or, as links, in the cache of the Hub that it is a snapshot of.
        dtype: of the parameters, a floating one; default: as stored, each.
        device: where each tensor goes at once.
        strict: raise for missing and unexpected tensors. Otherwise missing ones begin as ``init_weights`` has them,
            unexpected ones are left aside, and one warning lists both.

    Raises:
        ValueError: what ``strict`` says, or tensors of other shapes, all in one error; tensors that are not floating; a
            file that is broken, or outside the folder; a configuration that is not supported; pickle files only.
        FileNotFoundError, NotADirectoryError: the folder, or a file in it.
        ModuleNotFoundError: safetensors is not installed.
    """
    _require_dtype(dtype)
    device = torch.device(device)
    folder = local_folder(folder)
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(folder))
    stored = stored_tensors(folder)
    found = match(model, {name: entry.shape for name, entry in stored.items()}, folder, strict)
    dtypes = {name: _dtype(stored[sources[0]]) for name, sources in found.sources.items()}
    usual = next(iter(dtypes.values()), torch.get_default_dtype())

    for name in dict.fromkeys(name.rpartition(".")[0] for name in found.missing):
        model.init_weights(model.get_submodule(name).to(dtype or usual).to_empty(device=device))
    for name, sources in found.sources.items():
        first = stored[sources[0]]
        tensor = torch.empty(first.shape, dtype=dtype or dtypes[name], device=device)
        tensor.copy_(first.read())
        _require_equal(stored, sources, folder)
        _assign(model, name, nn.Parameter(tensor))
    model.tie_weights()
    left = [*listed("missing, and initialised", found.missing), *listed("left aside", found.unexpected)]
    if left:
        warnings.warn(f"{folder} does not fit {cls.__name__}: {'; '.join(left)}", stacklevel=3)
    return model.eval()


def _require_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, not {dtype!r}")


def _dtype(entry: Stored) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry.name} in {entry.path} is {entry.dtype}: only {', '.join(DTYPES)} can be loaded")
    return DTYPES[entry.dtype]


def _require_equal(stored: Mapping[str, Stored], sources: list[str], folder: Path) -> None:
    """Tensors that are one parameter here are equal bit for bit."""
    for other in sources[1:]:
        if not torch.equal(stored[sources[0]].read(), stored[other].read()):
            raise ValueError(
                f"{sources[0]} and {other} in {folder} differ, and are one parameter by its {CONFIG_FILE}: set "
                "tie_word_embeddings to false in it if they are not meant to be"
            )


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


# ------------------------------------------------------------------------------------------------------------- sharing


def share(cls: type[Model], transformers_model: nn.Module) -> Model:
    """Make a model of the parameters of a live one of transformers, which both then have: train one and the other is.

    Nothing is copied. Training or evaluation mode is the other model's; a decoder is taken out of any model that has
    it, heads only from the class of the same name.

    Args:
        transformers_model: of 4.57 or 5.x, whole on one device.

    Raises:
        TypeError: it is of another class.
        ValueError: it is quantised, in part on another device or on none, or altered, so that its parameters are not
            those of ``cls``; a configuration that is not supported.
    """
    _require_class(cls, transformers_model)
    altered = [name for name, module in transformers_model.named_modules() if hasattr(module, "_hf_hook")]
    if altered:
        raise ValueError(
            f"transformers_model is spread or offloaded by accelerate (a hook on {altered[0] or 'the model'}): load it "
            "without device_map"
        )
    parameters = dict(transformers_model.named_parameters(remove_duplicate=False))
    kinds = {parameter.dtype for parameter in parameters.values()}
    if getattr(transformers_model, "is_quantized", False) or not kinds <= set(DTYPES.values()):
        raise ValueError(f"transformers_model is quantised (dtypes {', '.join(map(str, kinds))}): load it unquantised")
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"transformers_model must be on one device and have data, and is on {', '.join(map(str, devices))}"
        )
    with torch.device("meta"):
        model = cls(transformers_model.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, (first, *others) in match(model, shapes, "transformers_model").sources.items():
        for other in others:
            if parameters[other] is not parameters[first]:
                raise ValueError(f"{first} and {other} are tied by the configuration, and are two parameters")
        _assign(model, name, parameters[first])
    model.tie_weights()
    return model.train(transformers_model.training)


def _require_class(cls: type[Model], theirs: nn.Module) -> None:
    family = cls.config_class.model_type
    ours = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith(f"{__package__}."))
    in_family = type(theirs).__module__ == f"transformers.models.{family}.modeling_{family}"
    with_head = hasattr(cls, "decoder_class")
    if not in_family or (type(theirs).__name__ != ours if with_head else not hasattr(theirs, "get_input_embeddings")):
        wanted = ours if with_head else f"{ours}, or a model that has one"
        raise TypeError(f"{cls.__name__} can be made of transformers' {wanted}, not of {type(theirs).__name__}")


# -------------------------------------------------------------------------------------------------------------- saving


def save(model: PretrainedModel, folder: str | Path, max_shard_bytes: int) -> None:
    """Write ``config.json``, and the tensors as one ``model.safetensors`` or as shards and their index.

    transformers, of 4.57 and 5.x, and :func:`load` read the folder. Files are complete before they get their names. Of
    an earlier checkpoint in the folder the tensors are removed, as far as its index names them; nothing else is.

    Args:
        max_shard_bytes: no file holds more, unless a single tensor does.

    Raises:
        ValueError, TypeError: ``max_shard_bytes``; parameters without data; embeddings that the configuration calls
            tied, and which are not.
        ModuleNotFoundError: safetensors is not installed.
    """
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int):
        raise TypeError(f"max_shard_bytes must be an int, not {type(max_shard_bytes).__name__}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    import_safetensors()
    from safetensors.torch import save_file

    tensors, folder = _tensors(model), Path(folder)
    shards = _shards(tensors, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    stale = _earlier_files(folder) - set(names)
    files = [folder / name for name in names]
    if len(shards) > 1:
        files.append(folder / INDEX_FILE)
        stale.discard(INDEX_FILE)
    with replacing(*files) as temporary:
        for shard, path in zip(shards, temporary, strict=False):
            save_file({name: tensors[name].contiguous() for name in shard}, path, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
                "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
            }
            temporary[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.save_pretrained(folder, type(model).__name__, model.dtype)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _tensors(model: PretrainedModel) -> dict[str, Tensor]:
    """What is stored, by the names in the files. Those that the configuration ties are stored once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    without_data = [name for name, parameter in parameters.items() if parameter.is_meta]
    if without_data:
        raise ValueError(f"{type(model).__name__} has parameters without data: {listed('on meta', without_data)[0]}")
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings:
        if head.weight is not model.get_input_embeddings().weight:
            raise ValueError("tie_word_embeddings of the configuration is True, and the embeddings are not tied")
        del parameters["lm_head.weight"]
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        if tensor.data_ptr() in seen:  # shared, and stored twice all the same: the configuration does not know of it
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[their_name(model, name)] = tensor
    return tensors


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file."""
    shards: list[list[str]] = []
    size = max_bytes + 1
    for name, tensor in tensors.items():
        if size + _bytes(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _earlier_files(folder: Path) -> set[str]:
    """Files of a checkpoint that was saved here before."""
    try:
        named = set(weight_map(folder / INDEX_FILE).values())
    except (FileNotFoundError, ValueError):
        named = set()
    return {name for name in named if _SHARD.fullmatch(name)} | {SINGLE_FILE, INDEX_FILE}
