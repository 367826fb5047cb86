"""Checks of what a configuration's fields hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, Any] = {"None": type(None), "bool": bool, "int": int, "float": int | float, "str": str}
_TYPES |= {"list": list, "dict": dict}
_SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3")


def require_field(name: str, annotation: str, value: object) -> None:
    """Check a value against its field.

    Args:
        annotation: as the dataclass has it. Whole numbers are counts, of at least 1, unless they are the id of a token;
            others are finite and not negative, and dropouts and shares are at most 1.

    Raises:
        TypeError, ValueError: with the name of the field.
    """
    if not any(_is_a(value, kind) for kind in annotation.split(" | ")):
        raise TypeError(f"{name} must be {annotation}, not {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or name.endswith("_token_id"):
        return
    low = 1 if annotation.startswith("int") else 0
    if not low <= value < math.inf:
        raise ValueError(f"{name} must be at least {low} and finite, not {value}")
    if (name == "rotary_pct" or "drop" in name) and value > 1:
        raise ValueError(f"{name} must be at most 1, not {value}")


def _is_a(value: object, kind: str) -> bool:
    return isinstance(value, _TYPES[kind.partition("[")[0]]) and (kind == "bool" or not isinstance(value, bool))


def complete_scaling(rope: Mapping[str, Any], longest: int) -> dict[str, Any] | None:
    """A ``rope_scaling`` with everything that its type needs; None where it changes nothing.

    Args:
        rope: what the configuration says; None stands for what is not said.
        longest: max_position_embeddings, from which transformers takes what is not said.

    Raises:
        TypeError, ValueError: with the name of what is wrong.
    """
    scaling = {name: value for name, value in rope.items() if value is not None}
    kinds = [scaling.pop(name) for name in ("rope_type", "type") if name in scaling] or ["default"]
    kind = kinds[0]
    if kinds[-1] != kind or kind not in _SCALINGS or (kind == "default" and scaling):
        raise ValueError(f"rope_scaling must be of one rope_type, of {', '.join(_SCALINGS)}, not {dict(rope)!r}")
    if kind == "default":
        return None
    if kind != "linear":
        scaling.setdefault("original_max_position_embeddings", longest)
    for name, value in scaling.items():
        whole = "original_max_position_embeddings"
        require_field(f"rope_scaling[{name!r}]", {"truncate": "bool", whole: "int"}.get(name, "float"), value)
    if kind == "dynamic" and scaling["original_max_position_embeddings"] != longest:
        # transformers takes no notice of another length, so that the numbers would not be its
        raise ValueError(
            "rope_scaling['original_max_position_embeddings'] of the type dynamic must be max_position_embeddings, "
            f"{longest}, not {scaling['original_max_position_embeddings']}"
        )
    if kind == "yarn" and "factor" in rope:
        scaling.setdefault("factor", longest / scaling["original_max_position_embeddings"])
    if scaling.get("factor") == 0:
        raise ValueError("rope_scaling['factor'] must be above 0")
    if kind == "llama3" and scaling.get("low_freq_factor", 0) >= scaling.get("high_freq_factor", math.inf):
        raise ValueError("rope_scaling['low_freq_factor'] must be below rope_scaling['high_freq_factor']")
    return {"rope_type": kind, **scaling}
