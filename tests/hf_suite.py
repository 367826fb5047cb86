"""transformers' own common model tests on its GPT-NeoX and GPT-J, as they are or swapped.

Run by test_swap_hf_suite.py, in a process of its own: pytest of this file, with HF_TESTS the folder ``tests`` of
transformers' source distribution, and SWAPPED=1 for swapped models.
"""

import importlib
import os
import random
import sys
import types
import unittest
from typing import Any

import torch
import transformers

import neox_kernels

FAMILIES = {
    "GPTNeoX": ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "GPTJ": ("Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"),
}
BATCH, SEQLEN, VOCAB = 3, 7, 99


def common() -> Any:
    """The module with the tests. The source distribution lacks those of export and generation, which it imports."""
    for name, missing in (
        ("", None),
        (".exporters", None),
        (".exporters.test_export", "ExportTesterMixin"),
        (".generation", None),
        (".generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(f"hf_tests{name}")
        module.__path__ = [os.environ["HF_TESTS"]] if not name else []
        if missing:
            setattr(module, missing, type(missing, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module("hf_tests.test_modeling_common")


def swapped_class(stock: type) -> type:
    """A class whose models are swapped as soon as they are made."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        assert neox_kernels.swap(self).replaced

    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})


class Small:
    """What the common tests ask of a model's own tests: a small configuration and inputs."""

    is_training = True
    batch_size, seq_length = BATCH, SEQLEN
    hidden_size, num_hidden_layers, num_attention_heads = 64, 2, 4

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        tokens = {"vocab_size": VOCAB, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1}
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        if self.family == "GPTJ":
            return transformers.GPTJConfig(**tokens, **sizes, n_positions=64, rotary_dim=4)
        return transformers.GPTNeoXConfig(**tokens, **sizes, intermediate_size=37, max_position_embeddings=64)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(random.randrange(1000))
        tokens = torch.randint(VOCAB - 1, (BATCH, SEQLEN), generator=generator)
        mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
        mask[0, SEQLEN // 2 :] = 0
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


Common = common()


def of(family: str) -> type:
    classes = [getattr(transformers, family + head) for head in FAMILIES[family]]
    if os.environ.get("SWAPPED") == "1":
        classes = [swapped_class(one) for one in classes]

    class Tests(Common.ModelTesterMixin, Common.GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc, name-defined]
        all_model_classes = tuple(classes)

        def setUp(self) -> None:
            random.seed(0)
            self.model_tester = Small(family)

    return Tests


TestGPTNeoX = of("GPTNeoX")
TestGPTJ = of("GPTJ")
