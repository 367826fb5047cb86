"""Models made of the parameters of transformers' live ones."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_models import CLASSES, renamed, their_model

from neox_kernels import models


def shared(name: str, theirs: nn.Module) -> Any:
    return getattr(models, name).from_transformers(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_parameters_are_theirs(name: str, dtype: torch.dtype) -> None:
    theirs = their_model(name, dtype)
    next(theirs.parameters()).requires_grad_(False)
    names = {name: id(parameter) for name, parameter in theirs.named_parameters()}
    ours = shared(name, theirs)
    assert {name: id(parameter) for name, parameter in ours.named_parameters()} == names
    assert {name: id(parameter) for name, parameter in theirs.named_parameters()} == names
    assert not next(ours.parameters()).requires_grad


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_training_one_trains_the_other(name: str) -> None:
    theirs = their_model(name).train()
    ours = shared(name, theirs)
    assert ours.training and not shared(name, theirs.eval()).training
    before = {name: parameter.clone() for name, parameter in renamed(ours).items()}
    tokens = torch.arange(10).view(1, 10)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    ours(tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in renamed(theirs).items() if not torch.equal(parameter, before[name])}
    assert len(changed) > len(before) / 2


@pytest.mark.parametrize("name", ["GPTNeoXForQuestionAnswering", "GPTNeoXForCausalLM", "GPTJForCausalLM"])
def test_a_decoder_is_taken_out_of_a_model_with_a_head(name: str) -> None:
    theirs = their_model(name)
    ours = shared("GPTNeoXModel" if "NeoX" in name else "GPTJModel", theirs)
    inner = dict(theirs.base_model.named_parameters())
    assert {name: id(x) for name, x in ours.named_parameters()} == {name: id(x) for name, x in inner.items()}


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GPTJForCausalLM"])
@pytest.mark.parametrize("known", [True, False])
def test_tied_embeddings_stay_tied(name: str, known: bool) -> None:
    theirs = their_model(name, tie_word_embeddings=known)
    theirs.get_output_embeddings().weight = theirs.get_input_embeddings().weight
    ours = shared(name, theirs)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours.get_input_embeddings().weight is theirs.get_input_embeddings().weight


def test_names_of_4_57() -> None:
    """Which called the head embed_out."""
    theirs = their_model("GPTNeoXForCausalLM")
    head = theirs.lm_head
    del theirs.lm_head
    theirs.embed_out = head
    assert shared("GPTNeoXForCausalLM", theirs).lm_head.weight is head.weight


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        ("GPTNeoXForCausalLM", "GPTNeoXForTokenClassification"),
        ("GPTNeoXForCausalLM", "GPTJForCausalLM"),
        ("GPTNeoXModel", "GPTJModel"),
        ("GPTJForSequenceClassification", "GPTJForCausalLM"),
    ],
)
def test_another_class(name: str, theirs: str) -> None:
    with pytest.raises(TypeError, match=f"{name} can be made of transformers' {name}.*, not of {theirs}"):
        shared(name, their_model(theirs))


def test_no_class_of_transformers() -> None:
    theirs = their_model("GPTNeoXModel")
    for other in (nn.Linear(2, 2), theirs.layers[0], models.GPTNeoXModel(theirs.config), None, "EleutherAI/pythia-70m"):
        with pytest.raises(TypeError, match="GPTNeoXModel can be made of transformers' GPTNeoXModel, or a model that"):
            shared("GPTNeoXModel", other)  # type: ignore[arg-type]
    theirs.__class__ = type("Changed", (type(theirs),), {})
    with pytest.raises(TypeError, match="not of Changed"):
        shared("GPTNeoXModel", theirs)


def refused(theirs: nn.Module, text: str, name: str = "GPTNeoXForCausalLM") -> None:
    with pytest.raises(ValueError, match=text):
        shared(name, theirs)


def test_models_that_are_not_whole() -> None:
    theirs = their_model("GPTNeoXForCausalLM")
    spread = copy.deepcopy(theirs)
    spread.gpt_neox.layers[1]._hf_hook = object()
    refused(spread, r"by accelerate \(a hook on gpt_neox.layers.1\): load it without device_map")
    meta = copy.deepcopy(theirs)
    meta.gpt_neox.layers[1].to("meta")
    refused(meta, "must be on one device and have data, and is on .*meta")
    refused(copy.deepcopy(theirs).to("meta"), "must be on one device")
    quantised = copy.deepcopy(theirs)
    quantised.is_quantized = True
    refused(quantised, "is quantised")
    eights = copy.deepcopy(theirs)
    weight = eights.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    eights.gpt_neox.layers[0].mlp.dense_h_to_4h.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    refused(eights, r"is quantised \(dtypes .*torch.int8")


def test_models_that_were_altered() -> None:
    theirs = their_model("GPTNeoXForCausalLM")
    theirs.gpt_neox.layers[0].mlp.adapter = nn.Linear(2, 2)
    refused(theirs, "2 unexpected: gpt_neox.layers.0.mlp.adapter.weight")
    untied = their_model("GPTNeoXForCausalLM", tie_word_embeddings=True)
    untied.get_output_embeddings().weight = nn.Parameter(torch.ones(96, 32))
    refused(untied, "are tied by the configuration, and are two parameters")
    odd = their_model("GPTNeoXForCausalLM")
    odd.config.hidden_act = "laplace"
    refused(odd, "hidden_act must be one of")
