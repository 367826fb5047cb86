"""CTranslate2's engine with the weights of a transformers model, as a peer of whole models on a CPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def generator_of(model: Any, compute_type: str = "float32", threads: int = 1) -> Any:
    """A ``ctranslate2.Generator`` of a GPT-NeoX or GPT-J language model in float32. Raises ModuleNotFoundError."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    # What CTranslate2 looks up in a checkpoint; of the vocabulary it needs but one name for each row.
    words = {f"<{index}>": index for index in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(get_vocab=lambda: words, bos_token="<0>", eos_token="<0>", unk_token="<0>")

    class Live(TransformersConverter):  # type: ignore[misc]
        """Converts the model at hand, where CTranslate2's own loads one from a folder."""

        def load_model(self, *_: Any, **__: Any) -> Any:
            return view

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return tokenizer

    model = copy.deepcopy(model)  # its converter permutes GPT-J's weights where they lie
    # By the names of older transformers, which CTranslate2 knows.
    config, head = model.config, model.get_output_embeddings()
    if config.model_type == "gpt_neox" and not hasattr(config, "rotary_pct"):
        config.rotary_pct = config.rope_parameters["partial_rotary_factor"]
    view = SimpleNamespace(**{**dict(model.named_children()), "config": config, "embed_out": head, "lm_head": head})
    with tempfile.TemporaryDirectory(prefix="neox-kernels-") as folder:
        source, target = Path(folder, "transformers"), Path(folder, "ctranslate2")
        config.save_pretrained(source)
        Live(str(source)).convert(str(target))
        options = {"inter_threads": 1, "intra_threads": threads, "compute_type": compute_type}
        return ctranslate2.Generator(str(target), device="cpu", **options)


def logits_of(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that gives the logits of these tokens, (batch, seqlen, vocabulary)."""
    engine, rows = generator_of(model, threads=torch.get_num_threads()), tokens.tolist()
    import numpy  # CTranslate2 needs it, so it is there

    return lambda: torch.from_numpy(numpy.asarray(engine.forward_batch(rows)))
