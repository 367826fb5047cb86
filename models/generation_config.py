"""How text is generated: the names and defaults that transformers has, checked before anything runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

_DEFAULT_NEW_TOKENS = 20
_LEAST = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pad_token_id": 0,
}
_FLAGS = (
    *("do_sample", "use_cache", "return_dict_in_generate"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
)
_MAY_BE_NONE = ("max_length", "max_new_tokens", "min_new_tokens", "top_k", "top_p", "min_p", "pad_token_id", "seed")
# What has an effect only together with something else.
_WITH = {
    "do_sample=True": ("temperature", "top_k", "top_p", "min_p", "seed"),
    "num_beams above 1": ("length_penalty", "early_stopping"),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated; every field is also an argument of ``generate`` and ``stream``.

    Attributes:
        max_length: tokens of a whole sequence, prompt and its padding included.
        max_new_tokens: tokens behind the prompt; it takes the place of ``max_length``. Default of both: 20 new ones, or
            as many as the model's positions leave.
        min_length, min_new_tokens: before so many tokens, counted likewise, neither an end token nor a stop sequence
            ends a sequence.
        do_sample: draw tokens; False takes the most likely one.
        temperature: with ``do_sample``, what scores are divided by.
        top_k: with ``do_sample``, draw from so many of the most likely tokens only; 0 or None: from all.
        top_p: with ``do_sample``, draw from the fewest tokens that have this probability together.
        min_p: with ``do_sample``, draw from tokens of at least this share of the most likely one's probability.
        repetition_penalty: divides the positive scores, and multiplies the negative ones, of tokens that are there.
        num_beams: sequences that are followed at once; 1: no beam search.
        length_penalty: beams are ranked by their log-probability over their new tokens to this power.
        early_stopping: when a beam search ends: True, once ``num_beams`` sequences are complete; False, once the best
            open one ranks behind them all; "never", once none can come to rank before them.
        num_return_sequences: sequences for each prompt, drawn, or the best of the beams.
        eos_token_id: the end token, or several; default: the configuration's. ``()`` for none.
        pad_token_id: follows in sequences that ended; default: the configuration's, or the first end token.
        stop_sequences: token sequences, each of which ends a sequence once the new tokens end with it.
        seed: of what is drawn; default: torch's global generator.
        use_cache: keep keys and values; False runs the whole sequence again for each token.
        return_dict_in_generate: return a :class:`GenerateOutput`, not only its ``sequences``.
        output_scores, output_logits, output_attentions, output_hidden_states: what a :class:`GenerateOutput` has.

    Raises:
        ValueError, TypeError: of a field, with its name, what it was and what it must be.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_sequences: Sequence[Sequence[int]] = ()
    seed: int | None = None
    use_cache: bool = True
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False

    def __post_init__(self) -> None:
        for name in (*_LEAST, "seed"):
            self._require_int(name, _LEAST.get(name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._require_float("temperature", "above 0", lambda x: x > 0)
        self._require_float("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1)
        self._require_float("min_p", "between 0 and 1", lambda x: 0 <= x <= 1)
        self._require_float("repetition_penalty", "above 0", lambda x: x > 0)
        self._require_float("length_penalty", "finite", math.isfinite)
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")
        several = self.num_return_sequences
        if self.num_beams > 1 and several > self.num_beams:
            raise ValueError(f"num_return_sequences must be at most num_beams, {self.num_beams}, not {several}")
        if self.num_beams == 1 and several > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences must be 1 without do_sample or beams, which give one sequence, not {several}"
            )
        self._require_tokens("eos_token_id", self.end_tokens)
        if not isinstance(self.stop_sequences, list | tuple):
            raise TypeError(f"stop_sequences must be a list of lists of tokens, not {self.stop_sequences!r}")
        for sequence in self.stop_sequences:
            if not isinstance(sequence, list | tuple) or not sequence:
                raise TypeError(f"stop_sequences must hold lists of at least one token, not {sequence!r}")
            self._require_tokens("stop_sequences", sequence)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return () if self.eos_token_id is None else _listed(self.eos_token_id)

    def changed(self, changes: dict[str, Any]) -> GenerationConfig:
        """With other values of these fields; TypeError names those that are none."""
        unknown = [name for name in changes if name not in _DEFAULTS]
        if unknown:
            raise TypeError(f"generate has no argument {', '.join(unknown)}; see GenerationConfig for those it has")
        return replace(self, **changes)

    def for_model(self, config: Any) -> GenerationConfig:
        """With the model's end and padding tokens where none are given, all of them in its vocabulary."""
        for needed, names in _WITH.items():
            idle = [name for name in names if getattr(self, name) != _DEFAULTS[name]]
            if idle and not (self.do_sample if needed.startswith("do_sample") else self.num_beams > 1):
                warnings.warn(f"without {needed} there is no effect of {' and '.join(idle)}", stacklevel=4)
        eos = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        pad = config.pad_token_id if self.pad_token_id is None else self.pad_token_id
        ends = () if eos is None else _listed(eos)
        pad = ends[0] if pad is None and ends else pad
        tokens = {"eos_token_id": ends, "pad_token_id": () if pad is None else (pad,)}
        tokens["stop_sequences"] = tuple(token for sequence in self.stop_sequences for token in sequence)
        for name, values in tokens.items():
            for token in values:
                if not 0 <= token < config.vocab_size:
                    raise ValueError(f"{name} must be between 0 and {config.vocab_size - 1}, not {token}")
        return replace(self, eos_token_id=ends, pad_token_id=pad)

    def new_tokens(self, prompt: int, limit: int | None) -> int:
        """How many tokens may follow a prompt of this length.

        Args:
            limit: positions of the model; None where it goes on behind them. Only the default heeds it.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS if limit is None else max(1, min(_DEFAULT_NEW_TOKENS, limit - prompt))
        if self.max_length <= prompt:
            raise ValueError(f"max_length must be above the {prompt} tokens of the prompt, not {self.max_length}")
        return self.max_length - prompt

    def least_tokens(self, prompt: int) -> int:
        """How many tokens must follow a prompt of this length."""
        return max(0, self.min_length - prompt) if self.min_new_tokens is None else self.min_new_tokens

    def _require_int(self, name: str, least: int | None) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")

    def _require_float(self, name: str, rule: str, holds: Any) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a float, not {value!r}")
        if not (holds(value) and math.isfinite(value)):
            raise ValueError(f"{name} must be {rule}, not {value}")

    def _require_tokens(self, name: str, tokens: Sequence[object]) -> None:
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"{name} must hold tokens, which are ints, not {token!r}")


def _listed(tokens: Any) -> tuple[Any, ...]:
    return tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)


_DEFAULTS = {field.name: field.default for field in fields(GenerationConfig)}
