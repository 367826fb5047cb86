"""Configurations of the two families, with the names, defaults and files of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from neox_kernels import rotary_tables
from neox_kernels.models.activations import ACTIVATIONS
from neox_kernels.models.fields import complete_scaling, require_field
from neox_kernels.models.files import local_folder, replacing

CONFIG_FILE = "config.json"
Config = TypeVar("Config", bound="ModelConfig")

_UNSUPPORTED = ("quantization_config", "pruned_heads", "per_layer_config")  # they would change what the models compute
_PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(kw_only=True)
class ModelConfig:
    """What both families' configurations have.

    Raises:
        ValueError, TypeError: of a field whose value is not supported, with its name.
    """

    model_type: ClassVar[str]
    other_names: ClassVar[dict[str, str]]  # which fields may have in files, and the fields

    vocab_size: int
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    classifier_dropout: float = 0.1
    num_labels: int | None = None  # as many as id2label has, or 2
    id2label: dict[Any, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """From what a ``config.json`` holds; names that are not fields are left aside."""
        kind = values.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r} for {cls.__name__}, not {kind!r}")
        for name in _UNSUPPORTED:
            if values.get(name):
                raise ValueError(f"{name} is not supported: {values[name]!r}")
        values = dict(values)
        for theirs, ours in cls.other_names.items():
            if theirs in values and values.setdefault(ours, values[theirs]) != values[theirs]:
                raise ValueError(f"{ours}={values[ours]!r} and {theirs}={values[theirs]!r} contradict each other")
        known = {field.name for field in fields(cls)}
        config = cls(**{name: value for name, value in values.items() if name in known})
        if values.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"head_dim must be hidden_size / num_attention_heads, not {values['head_dim']!r}")
        return config

    @classmethod
    def from_pretrained(cls: type[Config], folder: str | Path) -> Config:
        """From a local folder with a ``config.json``."""
        path = local_folder(folder) / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold an object, not {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def of(cls: type[Config], source: object) -> Config:
        """From such a configuration, a mapping, a folder, or transformers' configuration object."""
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if isinstance(source, str | Path):
            return cls.from_pretrained(source)
        if hasattr(source, "to_dict") and not isinstance(source, ModelConfig):
            values: dict[str, Any] = source.to_dict()
            return cls.from_dict({**values, "num_labels": getattr(source, "num_labels", None)})
        raise TypeError(
            f"config must be a {cls.__name__}, a mapping, a folder or transformers' configuration object, not "
            f"{type(source).__name__}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; transformers of every version reads it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("id2label", "label2id", "problem_type", "rope_parameters"):
            if values.get(name) is None:
                values.pop(name, None)
        if "id2label" in values:
            del values["num_labels"]  # it follows
        return {"model_type": self.model_type, **values}

    def save_pretrained(
        self, folder: str | Path, architecture: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write ``config.json``; ``architecture`` is the name of the model's class, ``dtype`` that of its weights."""
        values = self.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        if dtype is not None:
            values["torch_dtype"] = str(dtype).removeprefix("torch.")  # every version reads this name
        Path(folder).mkdir(parents=True, exist_ok=True)
        with replacing(Path(folder) / CONFIG_FILE) as (path,):
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __post_init__(self: Any) -> None:  # the families have the sizes, as fields or as properties
        for field in fields(self):
            require_field(field.name, str(field.type), getattr(self, field.name))
        if self.id2label:
            try:
                self.id2label = {int(key): label for key, label in self.id2label.items()}  # JSON makes them strings
            except ValueError:
                raise ValueError(f"id2label must have numbers as keys, not {self.id2label!r}") from None
            if self.num_labels not in (None, len(self.id2label)):
                raise ValueError(f"num_labels must be that of id2label, {len(self.id2label)}, not {self.num_labels}")
        self.num_labels = len(self.id2label) if self.id2label else self.num_labels or 2
        if self.problem_type not in _PROBLEMS:
            raise ValueError(f"problem_type must be one of {', '.join(map(str, _PROBLEMS))}, not {self.problem_type!r}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type='single_label_classification' needs num_labels of at least 2")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"{self.activation_field} must be one of {known}, not {self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.other_names.get('hidden_size', 'hidden_size')} must be a multiple of the "
                f"{self.num_attention_heads} attention heads, not {self.hidden_size}"
            )
        if self.rotary_dim_of_head % 2 or self.rotary_dim_of_head > self.head_dim:
            raise ValueError(
                f"{self.rotary_field} must make an even number of rotated features of up to head_dim={self.head_dim}, "
                f"not {self.rotary_dim_of_head}"
            )

    @property
    def head_dim(self: Any) -> int:
        return int(self.hidden_size // self.num_attention_heads)


@dataclass(kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """Fields, defaults and meaning as in transformers, of all its versions.

    ``rope_parameters``, as version 5 writes it, takes the place of ``rotary_pct``, ``rotary_emb_base`` and
    ``rope_scaling``, where it has them.
    """

    model_type: ClassVar[str] = "gpt_neox"
    other_names: ClassVar[dict[str, str]] = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
    rotary_field: ClassVar[str] = "rotary_pct"
    activation_field: ClassVar[str] = "hidden_act"
    limits_positions: ClassVar[bool] = False

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    use_parallel_residual: bool = True
    attention_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("rope_scaling", "rope_parameters"):
            require_field(name, "dict[str, Any] | None", getattr(self, name))
        if self.rope_scaling and self.rope_parameters and self.rope_scaling != self.rope_parameters:
            raise ValueError("rope_scaling and rope_parameters contradict each other: give one")
        rope = dict(self.rope_scaling or self.rope_parameters or {})
        self.rope_parameters = None
        for theirs, ours in self.other_names.items():
            value = rope.pop(theirs, None)
            if value is not None:
                setattr(self, ours, value)
        super().__post_init__()
        self.rope_scaling = complete_scaling(rope, self.max_position_embeddings)
        if not self.rotary_emb_base > 1:
            raise ValueError(f"rotary_emb_base must be above 1, not {self.rotary_emb_base}")
        try:
            rotary_tables(self.rotary_dim_of_head, 0, self.rotary_base, self.rope_scaling, device="cpu")
        except ValueError as error:
            raise ValueError(f"rope_scaling is not supported: {error}") from None

    @property
    def rotary_dim_of_head(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    @property
    def rotary_base(self) -> float:
        return self.rotary_emb_base

    @property
    def embedding_dropout(self) -> float:
        return self.hidden_dropout


@dataclass(kw_only=True)
class GPTJConfig(ModelConfig):
    """Fields, defaults and meaning as in transformers; what GPT-NeoX calls otherwise has that name too, to read."""

    model_type: ClassVar[str] = "gptj"
    other_names: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    rotary_field: ClassVar[str] = "rotary_dim"
    activation_field: ClassVar[str] = "activation_function"
    limits_positions: ClassVar[bool] = True  # the original has a table of this length

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256

    rotary_base: ClassVar[float] = 10000.0
    rope_scaling: ClassVar[None] = None

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def intermediate_size(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def hidden_act(self) -> str:
        return self.activation_function

    @property
    def layer_norm_eps(self) -> float:
        return self.layer_norm_epsilon

    @property
    def attention_dropout(self) -> float:
        return self.attn_pdrop

    @property
    def hidden_dropout(self) -> float:
        return self.resid_pdrop

    @property
    def embedding_dropout(self) -> float:
        return self.embd_pdrop

    @property
    def rotary_dim_of_head(self) -> int:
        """``rotary_dim``; None stands for the width of the embedding, which only a single head has."""
        return self.n_embd if self.rotary_dim is None else self.rotary_dim
