"""The models as modules: weights, embeddings, dropout, devices, losses, outputs, and PyTorch's own tools."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from model_cases import FAMILIES, HEADS, LAYERS, PAD, VOCAB, WIDTH, Errors, batch, hf_config, in_float64, pair

from neox_kernels import models
from neox_kernels.testing import assert_within_budget

IDS = batch()["input_ids"]
DROPOUTS = {"GPTNeoX": ("hidden_dropout", "attention_dropout"), "GPTJ": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
EVERY = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize("implementation", ["eager", "fused", "sdpa"])
@pytest.mark.parametrize("name", [*DROPOUTS["GPTNeoX"], *DROPOUTS["GPTJ"]])
@torch.no_grad()
def test_dropout(name: str, implementation: str) -> None:
    """Each by itself: in training only, as the seed says, and right in the mean, which a linear model shows."""
    family = "GPTNeoX" if name in DROPOUTS["GPTNeoX"] else "GPTJ"
    _, ours = pair(family, **dict.fromkeys(DROPOUTS[family], 0.0))
    _, dropping = pair(family, **{**dict.fromkeys(DROPOUTS[family], 0.0), name: 0.4})
    ours.attn_implementation = dropping.attn_implementation = implementation
    expected = ours(IDS).logits
    assert torch.equal(dropping(IDS).logits, expected)
    dropping.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(dropping(IDS).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], expected)
    if name in ("attention_dropout", "attn_pdrop") and implementation != "sdpa":
        torch.manual_seed(1)
        dropped = dropping(IDS.repeat(40, 1), output_attentions=True).attentions[0]
        kept = ours(IDS.repeat(40, 1), output_attentions=True).attentions[0]
        gone = (dropped == 0) & (kept > 0)
        share = gone.sum().item() / (kept > 0).sum().item()
        assert abs(share - 0.4) < 0.02  # 32760 draws: 7 standard deviations
        error = (dropped - kept / 0.6).masked_fill(gone, 0).abs().max()
        assert error <= 2 * torch.finfo(torch.float32).eps / 0.6


@pytest.mark.parametrize("head", EVERY)
@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights(family: str, head: str) -> None:
    torch.manual_seed(0)
    model = getattr(models, family + head)(hf_config(family, initializer_range=0.05))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            spread = module.weight.std().item()
            assert abs(spread / 0.05 - 1) < 6 / (2 * module.weight.numel()) ** 0.5, name
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(WIDTH)), name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), name
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(family: str, tied: bool) -> None:
    for size in (VOCAB + 9, VOCAB - 9):
        theirs, ours = pair(family, tie_word_embeddings=tied)
        kept = min(size, VOCAB)
        tokens = IDS % kept
        theirs.resize_token_embeddings(size, mean_resizing=False)
        embedding = ours.resize_token_embeddings(size)
        assert embedding is ours.get_input_embeddings() and ours.config.vocab_size == size
        assert (ours.lm_head.weight is embedding.weight) == tied
        errors = Errors()
        same, truth = theirs(tokens).logits, in_float64(theirs)(tokens).logits
        got = ours(tokens, labels=tokens)
        assert got.logits.shape == same.shape
        errors.add("logits", *(x[..., :kept].detach() for x in (got.logits, same, truth)))
        errors.check()
        got.loss.backward()
        assert ours.lm_head.weight.grad.shape == (size, WIDTH) and embedding.weight.grad[tokens].any()
        if ours.lm_head.bias is not None:
            assert ours.lm_head.bias.shape == (size,) and not ours.lm_head.bias[kept:].any()
        new = embedding.weight[kept:].detach()
        assert not new.numel() or 0 < new.std() < 2 * ours.config.initializer_range
    frozen = pair(family, tie_word_embeddings=tied)[1].requires_grad_(False)
    frozen.resize_token_embeddings(VOCAB + 1)
    assert not any(x.requires_grad for x in frozen.parameters())
    other, head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
    ours.set_input_embeddings(other)
    ours.set_output_embeddings(head)
    assert ours.get_input_embeddings() is other and ours.get_output_embeddings() is head
    ours.tie_weights()
    assert (head.weight is other.weight) == tied


@pytest.mark.parametrize("head", EVERY)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_several_devices(family: str, head: str) -> None:
    """CPU and meta stand in for GPUs: on meta there are shapes and devices, and an operation between both fails."""
    ours = getattr(models, family + head)(pair(family)[0].config).eval()
    expected = ours(IDS)[0]
    ours.parallelize({torch.device("cpu"): range(LAYERS)})
    assert torch.equal(ours(IDS)[0], expected)
    ours.deparallelize()
    assert torch.equal(ours(IDS)[0], expected)
    behind = copy.deepcopy(ours)
    ours.parallelize({"meta": [1], "cpu": [0]})
    layers = ours.decoder.layers_in_order
    assert {x.device.type for x in layers[0].parameters()} == {"cpu"}
    assert {x.device.type for x in layers[1].parameters()} == {"meta"}
    assert {x.device.type for x in ours.get_input_embeddings().parameters()} == {"cpu"}
    inputs = {**batch("left"), "head_mask": torch.ones(HEADS), "position_ids": torch.arange(13)[None]}
    output = ours(**inputs, output_hidden_states=True, output_attentions=True)
    first = output[0]
    assert first.device.type == "meta" and first.shape == expected.shape
    assert [x.device.type for x in output.hidden_states] == ["cpu", "meta", "meta"]
    assert [x.device.type for x in output.attentions] == ["cpu", "meta"]
    if head == "ForCausalLM":
        cache = output.past_key_values
        assert [cache.keys(i).device.type for i in range(LAYERS)] == ["cpu", "meta"]
        more = ours(IDS[:, :1], past_key_values=cache, labels=IDS[:, :1])
        assert more.logits.shape == (3, 1, VOCAB) and more.loss.device.type == "meta"
    behind.parallelize({"meta": [0], "cpu": [1]})
    assert {x.device.type for x in behind.get_input_embeddings().parameters()} == {"meta"}
    assert behind.decoder.last_device == torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_stays_with_its_embedding(family: str) -> None:
    _, ours = pair(family, tie_word_embeddings=True)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    expected = ours(IDS).logits
    ours.parallelize({"cpu": range(LAYERS)})
    assert torch.equal(ours(IDS).logits, expected)
    ours.parallelize({"cpu": [0], "meta": [1]})
    assert ours.lm_head.weight is ours.get_input_embeddings().weight and ours.lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_last_token(family: str) -> None:
    theirs, ours = pair(family, "ForSequenceClassification")
    exact, errors = in_float64(theirs), Errors()
    for padding in ("left", "right", "both"):
        inputs = batch(padding)
        same, truth = theirs(**inputs).logits, exact(**inputs).logits
        mask = inputs["attention_mask"]
        embedded = {"inputs_embeds": ours.get_input_embeddings()(inputs["input_ids"]), "attention_mask": mask}
        errors.add("tokens", ours(**inputs).logits, same, truth)
        errors.add("embeddings", ours(**embedded).logits, same, truth)
        ours.config.pad_token_id = None
        errors.add("no padding token", ours(**inputs).logits, same, truth)
        ours.config.pad_token_id = PAD
    errors.check()


PROBLEMS: dict[str, tuple[int, Tensor]] = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression of several": (3, torch.linspace(-2, 2, 9).view(3, 3).mT),
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_sequences(family: str, problem: str, named: bool) -> None:
    num_labels, labels = PROBLEMS[problem]
    kind = problem.partition(" of")[0] if named or problem == "regression of several" else None
    theirs, ours = pair(family, "ForSequenceClassification", num_labels=num_labels, problem_type=kind)
    exact, errors = in_float64(theirs), Errors()
    for seed in range(20):  # a loss is one number: of few, ours or theirs may be right by chance
        inputs = batch("right", seed)
        wide = labels.double() if labels.is_floating_point() else labels
        same, truth = theirs(**inputs, labels=labels).loss, exact(**inputs, labels=wide).loss.detach()
        errors.add("loss", ours(**inputs, labels=labels).loss, same, truth)
    errors.check()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_labels_that_do_not_count(family: str) -> None:
    _, ours = pair(family)
    labels = IDS.clone()
    labels[:, 5:] = -100
    assert torch.equal(ours(IDS, labels=labels).loss, ours(IDS[:, :5], labels=IDS[:, :5]).loss)
    assert torch.equal(ours(IDS, labels=labels.int()).loss, ours(IDS, labels=labels).loss)
    assert ours(IDS, labels=torch.full_like(IDS, -100)).loss.isnan()  # a mean over nothing, as in transformers
    qa = getattr(models, f"{family}ForQuestionAnswering")(ours.config).eval()
    inside, outside = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 99])
    logits = qa(IDS)
    expected = nn.functional.cross_entropy(logits.start_logits[:2], inside[:2])
    expected = (expected + nn.functional.cross_entropy(logits.end_logits, inside)) / 2
    assert torch.equal(qa(IDS, start_positions=outside, end_positions=inside[:, None]).loss, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs(family: str) -> None:
    theirs, ours = pair(family)
    arguments = {"labels": IDS, "output_attentions": True, "output_hidden_states": True}
    output, same = ours(IDS, **arguments), theirs(IDS, **arguments)
    assert list(same.keys()) == ["loss", "logits", "past_key_values", "hidden_states", "attentions"]
    for i, name in enumerate(same.keys()):
        assert output[name] is output[i] is getattr(output, name)
    loss, logits, *_ = output
    assert loss is output.loss and logits is output[1] and len(output) == 5 and len(output[:2]) == 2
    for name in ("nothing", "to_tuple"):
        with pytest.raises(KeyError, match=name):
            output[name]
    plain = ours(IDS, **arguments, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 5 and torch.equal(plain[1], logits)
    assert ours(IDS, use_cache=False)[0].shape == logits.shape  # what is None is left out
    for keep in (1, 3, 13, torch.tensor([0, 5])):
        got, same, truth = (x(IDS, logits_to_keep=keep).logits for x in (ours, theirs, in_float64(theirs)))
        assert_within_budget(got, same, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_dtypes_and_replaced_modules(family: str) -> None:
    _, ours = pair(family)
    with torch.inference_mode():  # what is made here must not be in the way of training
        expected = ours(IDS).logits
    assert torch.equal(ours(IDS).logits, expected)
    ours(IDS, labels=IDS).loss.backward()
    ours.attn_implementation = "fused"
    with torch.no_grad():
        expected = ours(IDS).logits
        for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert made.attn_implementation == "fused" and torch.equal(made(IDS).logits, expected)
            made.get_input_embeddings().weight.zero_()
        assert torch.equal(ours(IDS).logits, expected)
        other = type(ours)(ours.config).eval()
        other.attn_implementation = "fused"
        other.load_state_dict(ours.state_dict())
        assert torch.equal(other(IDS).logits, expected)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = copy.deepcopy(ours).to(dtype)
            assert narrow(IDS).logits.dtype == (torch.float32 if family == "GPTJ" else dtype)
            cos, sin = narrow.decoder.rotary_emb.tables(13, torch.device("cpu"))
            assert cos.dtype == sin.dtype == torch.float32
            assert torch.equal(cos, ours.decoder.rotary_emb.tables(13, torch.device("cpu"))[0])
        weights = {name: 2 * x for name, x in ours.named_parameters()}
        doubled = copy.deepcopy(ours)
        for x in doubled.parameters():
            x.mul_(2)
        assert torch.equal(torch.func.functional_call(ours, weights, (IDS,)).logits, doubled(IDS).logits)
    assert ours.half()(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_compile_and_export(family: str) -> None:
    _, ours = pair(family)
    torch._dynamo.reset()  # both families run the same code, which counts as compiled too often
    mask, rows = batch("left")["attention_mask"], torch.arange(13)[None]
    for inputs, backend in (
        ({"attention_mask": mask, "position_ids": rows}, "eager"),
        ({"head_mask": torch.rand(HEADS), "output_attentions": True, "output_hidden_states": True}, "eager"),
        ({}, "aot_eager"),
    ):
        expected = ours(IDS, use_cache=False, labels=IDS, **inputs)
        got = torch.compile(ours, fullgraph=True, backend=backend)(IDS, use_cache=False, labels=IDS, **inputs)
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    ours.zero_grad()
    expected.loss.backward()
    whole = {name: x.grad.clone() for name, x in ours.named_parameters()}
    ours.zero_grad()
    got.loss.backward()
    assert all(torch.equal(x.grad, whole[name]) for name, x in ours.named_parameters())
    arguments: dict[str, Any] = {"use_cache": False, "return_dict": False}
    exported = torch.export.export(ours, (IDS,), arguments).module()
    assert torch.equal(exported(IDS, **arguments)[0], ours(IDS, **arguments)[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_autocast(family: str) -> None:
    theirs, ours = pair(family)
    for implementation in ("eager", "fused", "sdpa"):
        ours.attn_implementation, errors = implementation, Errors()
        for seed in range(10):
            inputs = batch("left", seed)
            truth = in_float64(theirs)(**inputs).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got, same = ours(**inputs).logits, theirs(**inputs).logits
            seen = inputs["attention_mask"].bool()
            errors.add("logits", got.to(same.dtype)[seen], same[seen], truth[seen])
        errors.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_at_all(family: str) -> None:
    """No rows, or no tokens: results without elements (transformers raises in most such calls)."""
    _, ours = pair(family)
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape, dtype=torch.long)
        output = ours(empty, output_hidden_states=True, output_attentions=True)
        assert output.logits.shape == (*shape, VOCAB)
        assert output.attentions[0].shape == (shape[0], HEADS, shape[1], shape[1])
    after = ours(IDS, past_key_values=output.past_key_values)
    assert torch.equal(after.logits, ours(IDS).logits) and after.past_key_values.length == 13
