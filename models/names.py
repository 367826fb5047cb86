"""The names of tensors: those of our parameters, and those in the checkpoints of all of Hugging Face's versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox_kernels.models.base import PretrainedModel

PREFIXES = {"gpt_neox": "gpt_neox.", "gptj": "transformer."}  # of the decoder's parameters, in a model with a head
_HEADS = ("lm_head", "score", "classifier", "qa_outputs")
# Constants that older versions stored with the weights. No parameter has such a name.
_BUFFERS = re.compile(
    r"(^|\.)((attn|attention)\.(bias|masked_bias|embed_positions)|rotary_emb\.(inv_freq|cos_cached|sin_cached))$"
)
_LISTED = 8  # names in an error, of each kind


def our_name(model: PretrainedModel, name: str) -> str | None:
    """What ``model`` calls the parameter that a checkpoint calls ``name``, whether it has such a one or not.

    None: the model has none by right. That is so of old versions' buffers, and of any head for a model without one.
    """
    if _BUFFERS.search(name):
        return None
    if model.config.model_type == "gpt_neox":
        name = re.sub(r"^embed_out\.", "lm_head.", name)
    prefix, is_head = PREFIXES[model.config.model_type], name.partition(".")[0] in _HEADS
    if model.decoder is model:
        return None if is_head else name.removeprefix(prefix)
    if name == "lm_head.weight" and model.config.tie_word_embeddings:
        return f"{prefix}{model.decoder.embedding_name}.weight"
    return name if is_head else prefix + name.removeprefix(prefix)


def their_name(model: PretrainedModel, name: str) -> str:
    """What a checkpoint calls our parameter ``name``, so that every version of transformers finds it."""
    return re.sub(r"^lm_head\.", "embed_out.", name) if model.config.model_type == "gpt_neox" else name


@dataclass
class Match:
    """Which of the tensors that were found goes where.

    Attributes:
        sources: of each of our parameters, the names of what was found for it: usually one.
        missing: our parameters for which nothing was found.
        unexpected: what was found and has no place.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def match(model: PretrainedModel, shapes: Mapping[str, tuple[int, ...]], origin: object, strict: bool = True) -> Match:
    """Find the places of what was found.

    Args:
        shapes: name and shape of every tensor that was found.
        origin: where, for the error.
        strict: also raise for missing and unexpected tensors.

    Raises:
        ValueError: what does not fit, all of it.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, misshaped = Match(), []
    for theirs, shape in shapes.items():
        ours = our_name(model, theirs)
        if ours is None:
            continue
        if ours not in expected:
            found.unexpected.append(theirs)
            continue
        found.sources.setdefault(ours, []).append(theirs)
        if shape != expected[ours]:
            misshaped.append(f"{theirs} is {shape}, not {expected[ours]}")
    found.missing = [name for name in expected if name not in found.sources]
    problems = [
        *(listed("missing", found.missing) if strict else ()),
        *(listed("unexpected", found.unexpected) if strict else ()),
        *listed("of another shape", misshaped),
    ]
    if problems:
        raise ValueError(f"{origin} does not fit {type(model).__name__}: {'; '.join(problems)}")
    return found


def listed(kind: str, names: Iterable[str]) -> list[str]:
    """One phrase that lists the names, or none where there are none."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"] if names else []
