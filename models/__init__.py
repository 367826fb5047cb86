"""GPT-NeoX and GPT-J in plain PyTorch on the fused ops; transformers is not needed."""

from neox_kernels.models.cache import KVCache
from neox_kernels.models.configuration import GPTJConfig, GPTNeoXConfig
from neox_kernels.models.generation_config import GenerationConfig
from neox_kernels.models.gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from neox_kernels.models.gptj import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJForTokenClassification,
    GPTJModel,
)
from neox_kernels.models.outputs import GenerateOutput

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJForTokenClassification",
    "GPTJModel",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    "GPTNeoXForQuestionAnswering",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXModel",
    "GenerateOutput",
    "GenerationConfig",
    "KVCache",
]
