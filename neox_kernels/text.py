"""Text that a checkpoint continues: what ``neox-kernels generate`` prints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from neox_kernels.models import GPTJForCausalLM, GPTNeoXForCausalLM

CLASSES = {"gpt_neox": GPTNeoXForCausalLM, "gptj": GPTJForCausalLM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Continuation:
    """A prompt and what follows.

    finish: why it ends: "end" (an end token), "stop" (a stop text, which is not part of it), "length", "interrupted".
    seconds: "load", "first_token" (the prompt is run for it), and "each_token" after it; None where there is none.
    """

    prompt: str
    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str = "length"
    seconds: dict[str, float | None] = field(default_factory=dict)


def load(folder: Path, dtype: str = "", device: str = "cpu") -> tuple[Any, Any]:
    """The model and the tokenizer of a folder. Raises ValueError or OSError where it has none, or no known ones."""
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"model_type of {folder / 'config.json'} must be one of {', '.join(CLASSES)}, not {kind!r}")
    try:
        tokenizer = Tokenizer.from_file(os.fspath(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    model = CLASSES[kind].from_pretrained(folder, dtype=DTYPES[dtype] if dtype else None, device=device)
    return model.eval(), tokenizer


def continuation(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: dict[str, Any],
    stop: Sequence[str] = (),
    show: Callable[[str], None] = lambda piece: None,
) -> Continuation:
    """Continue a prompt, and ``show`` each piece of the text once no later token can change it.

    Args:
        settings: arguments of ``model.generate``.
        stop: texts, before the first of which the text ends.
    """
    if "" in stop:
        raise ValueError("a stop text must have at least one character")
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("the prompt must have at least one token")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"tokenizer.json has token {max(ids)}, and the model only {model.config.vocab_size}")
    found = Continuation(prompt, prompt_tokens=len(ids))
    given = torch.tensor([ids])
    begun = time.perf_counter()
    decoder, shown, times = DecodeStream(skip_special_tokens=True), 0, []
    ends = _end_tokens(model.config)
    try:
        for token in _tokens(model, given, settings):
            times.append(time.perf_counter() - begun)
            found.new_tokens += 1
            if token in ends:
                found.finish = "end"
                break
            found.text += decoder.step(tokenizer, token) or ""
            places = [at for at in (found.text.find(one) for one in stop) if at >= 0]
            if places:
                found.text, found.finish = found.text[: min(places)], "stop"
                break
            safe = len(found.text) - _begun(found.text, stop)
            if safe > shown:
                show(found.text[shown:safe])
                shown = safe
    except KeyboardInterrupt:
        found.finish = "interrupted"
    show(found.text[shown:])
    found.seconds["first_token"] = round(times[0], 6) if times else None
    found.seconds["each_token"] = round((times[-1] - times[0]) / (len(times) - 1), 6) if len(times) > 1 else None
    return found


def _tokens(model: Any, given: Tensor, settings: dict[str, Any]) -> Iterator[int]:
    if settings.get("num_beams", 1) > 1:
        yield from model.generate(given, **settings)[0, given.shape[1] :].tolist()
    else:
        yield from (int(new[0]) for new in model.stream(given, **settings))


def _end_tokens(config: Any) -> tuple[int, ...]:
    end = config.eos_token_id
    return () if end is None else (end,) if isinstance(end, int) else tuple(end)


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text a stop text may begin with."""
    lengths = (n for one in stop for n in range(1, len(one)) if text.endswith(one[:n]))
    return max(lengths, default=0)


def show(
    folder: Path, prompt: str, settings: dict[str, Any], stop: Sequence[str], dtype: str, device: str, as_json: bool
) -> str:
    """Print the prompt and its continuation, or JSON; gives why it ended. Raises ValueError and OSError."""
    begun = time.perf_counter()
    model, tokenizer = load(folder, dtype, device)
    loading = round(time.perf_counter() - begun, 6)
    if as_json:
        found = continuation(model, tokenizer, prompt, settings, stop)
        found.seconds = {"load": loading, **found.seconds}
        print(json.dumps(asdict(found), indent=2))
    else:
        print(prompt, end="", flush=True)
        found = continuation(model, tokenizer, prompt, settings, stop, lambda piece: print(piece, end="", flush=True))
        print()
    return found.finish
