"""What hooks on the models' modules see, head masks, gradient checkpointing, and dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from model_cases import FAMILIES, HEADS, LAYERS, WIDTH, Errors, batch, in_float64, pair

from neox_kernels.models import KVCache

DTYPES = (torch.float32, torch.bfloat16)


def tensors(x: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a hook's argument, and where it is."""
    if isinstance(x, Tensor):
        yield path, x
    elif isinstance(x, tuple):
        for i, item in enumerate(x):
            yield from tensors(item, f"{path}[{i}]")


class Seen:
    """What hooks on every module but the outermost ones keep, as they got it and copied."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.kept: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.structure: dict[str, str] = {}
        for name, module in model.named_modules():
            if name not in ("", prefix):
                module.register_forward_hook(self._forward(name), with_kwargs=True)
                module.register_full_backward_hook(self._backward(name))

    def _keep(self, name: str, x: Any) -> None:
        self.structure[name] = f"tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
        for path, tensor in tensors(x, name):
            self.kept[path], self.copies[path] = tensor, tensor.detach().clone()

    def _forward(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self._keep(f"{name} input", args[0] if args else kwargs["hidden_states"])
            self._keep(f"{name} output", output)

        return hook

    def _backward(self, name: str) -> Any:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            self._keep(f"{name} gradient", grad_output[0])

        return hook


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["eager", "fused", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_what_they_see_in_transformers(
    family: str, implementation: str, dtype: torch.dtype, training: bool
) -> None:
    theirs, ours = pair(family, dtype=dtype)
    exact, errors = in_float64(theirs), Errors()
    prefix = {"GPTNeoX": "gpt_neox", "GPTJ": "transformer"}[family]
    assert {name for name, _ in theirs.named_modules()} <= {name for name, _ in ours.named_modules()}
    ours.attn_implementation = implementation
    seen = [Seen(model.train(training), prefix) for model in (ours, theirs, exact)]
    for seed in range(6):
        tokens = batch(seed=seed)["input_ids"]
        for model in (ours, theirs, exact):
            with torch.set_grad_enabled(training):
                loss = model(tokens, labels=tokens).loss
            if training:
                loss.backward()
        for kept in seen:
            changed = [name for name, x in kept.kept.items() if not torch.equal(x, kept.copies[name])]
            assert not changed
        fired = [{name for name in kept.structure} for kept in seen]
        assert fired[0] == fired[1]
        for name in fired[0]:
            assert seen[0].structure[name] == seen[1].structure[name], name
        expected = seen[1].copies.keys()
        without = {name for name in expected - seen[0].copies.keys()}
        probabilities = {name for name in expected if name.endswith("attention output[1]")}
        # As in transformers' own sdpa there are none where nobody asks for them; GPT-J's dropout is hooked, and does.
        assert without == (probabilities if implementation == "auto" else set())
        assert bool(probabilities) == (family == "GPTNeoX")
        for name in expected - without:
            got, same, truth = (kept.copies[name] for kept in seen)
            if not same.is_floating_point():
                assert torch.equal(got, same)
                continue
            errors.add(name, got.to(same.dtype), same, truth)  # GPT-J's probabilities may be kept in float32
    assert len(errors.ours) > (75 if training else 50)
    errors.check()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_kept_of_the_projections_is_never_rotated(family: str) -> None:
    """Whoever gets hold of a projection's result: a hook, a global hook, a wrapper, a patched forward."""
    _, ours = pair(family)
    tokens, kept = batch()["input_ids"], []
    expected = ours(tokens).logits

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.extend((x, x.clone()) for _, x in tensors(output))

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            kept.append((out, out.clone()))
            return out

    def patched(linear: nn.Linear) -> Any:
        def forward(x: Tensor) -> Tensor:
            out = nn.functional.linear(x, linear.weight, linear.bias)
            kept.append((out, out.clone()))
            return out

        return forward

    def check() -> None:
        # A global hook is on GPT-J's dropout too, and so on the softmax's own way.
        for use_cache in (True, False):
            got = ours(tokens, use_cache=use_cache).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert kept and all(torch.equal(x, copied) for x, copied in kept)
        kept.clear()

    layer = ours.decoder.layers_in_order[0]
    attention = layer.attention if family == "GPTNeoX" else layer.attn
    for name in ("query_key_value",) if family == "GPTNeoX" else ("q_proj", "k_proj"):
        linear = getattr(attention, name)
        for hooked in (linear, attention, layer):
            handle = hooked.register_forward_hook(keep)
            check()
            handle.remove()
        handle = nn.modules.module.register_module_forward_hook(keep)
        check()
        handle.remove()
        setattr(attention, name, Wrapper(linear))
        check()
        setattr(attention, name, linear)
        linear.forward = patched(linear)
        check()
        del linear.forward


@pytest.mark.parametrize("implementation", ["eager", "fused", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_masks(family: str, dtype: torch.dtype, implementation: str) -> None:
    """Against transformers with what each head gives scaled on its way into the last projection of attention, which is
    the same as scaling its probabilities; the gradient of the mask too."""
    theirs, ours = pair(family, dtype=dtype)
    exact, errors = in_float64(theirs), Errors()
    ours.attn_implementation = implementation
    masks: list[Any] = [
        torch.tensor([0.0, 1.0, 1.0]),
        torch.rand(LAYERS, HEADS),
        [torch.tensor([1.0, 0.25, 0.0]), None],
    ]
    masks.append(torch.tensor([1, 0, 1]))
    for seed, mask in itertools.product(range(4), masks):
        tokens = batch(seed=seed)["input_ids"]
        whole = [torch.ones(HEADS) if row is None else row for row in mask] if isinstance(mask, list) else mask
        rows = (torch.stack(whole) if isinstance(whole, list) else whole).to(dtype).expand(LAYERS, HEADS).clone()
        results = []
        for model in (theirs, exact):
            given = rows.to(model.dtype, copy=True).requires_grad_()
            handles = []
            for i, layer in enumerate(layers_of(model)):
                dense = layer.attention.dense if family == "GPTNeoX" else layer.attn.out_proj

                def scale(_: nn.Module, args: Any, row: Tensor = given[i]) -> Any:
                    return (args[0] * row.repeat_interleave(WIDTH // HEADS),)

                handles.append(dense.register_forward_pre_hook(scale))
            logits = model(tokens).logits
            logits.float().square().mean().backward()
            results.append((logits.detach(), given.grad))
            for handle in handles:
                handle.remove()
        if isinstance(mask, Tensor) and mask.dim() == 2:
            leaf = rows.clone().requires_grad_()
            ours(tokens, head_mask=leaf).logits.float().square().mean().backward()
            errors.add("gradient", leaf.grad, results[0][1], results[1][1])
        with torch.no_grad():
            output = ours(tokens, head_mask=mask, output_attentions=True)
            without = ours(tokens, output_attentions=True)
        errors.add("logits", output.logits.to(dtype), results[0][0], results[1][0])
        masked = without.attentions[0] * rows[0][:, None, None]
        errors.add("probabilities", output.attentions[0], masked, masked.double())
    errors.check()
    with pytest.raises(ValueError, match="head mask"):
        ours.attn_implementation = "sdpa"
        ours(tokens, head_mask=torch.ones(HEADS))


def layers_of(theirs: Any) -> nn.ModuleList:
    decoder = getattr(theirs, theirs.base_model_prefix)
    found: nn.ModuleList = decoder.layers if hasattr(decoder, "layers") else decoder.h
    return found


def trained(model: Any, inputs: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Bytes that the forward saved for the backward, and the gradients."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train().zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).loss
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(saved.values()), {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "fused", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, implementation: str) -> None:
    """Not a bit changes, with dropout either, and little is kept."""
    dropouts = {"GPTNeoX": ("hidden_dropout", "attention_dropout"), "GPTJ": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    _, ours = pair(family, num_hidden_layers=4, **dict.fromkeys(dropouts[family], 0.2))
    ours.attn_implementation = implementation
    bias = torch.randn(3, 1, 13, 13)
    for extra in ({}, {"output_hidden_states": True}, {"attention_mask": batch("left")["attention_mask"]},
                  {"attention_mask": bias}):  # fmt: skip
        inputs = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"], **extra}
        ours.gradient_checkpointing_disable()
        whole, expected = trained(ours, inputs)
        ours.gradient_checkpointing_enable()
        kept, got = trained(ours, inputs)
        assert kept < whole / 2
        assert all(torch.equal(got[name], x) for name, x in expected.items())
    for refused in ({"use_cache": True}, {"past_key_values": KVCache()}):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            ours(**inputs, **refused)
    assert ours(**inputs).past_key_values is None
    assert ours.eval()(**inputs).past_key_values is not None


@torch.no_grad()
def test_a_hook_may_change_the_tables() -> None:
    """As in transformers, what a hook on rotary_emb returns is what the layers rotate by."""
    theirs, ours = pair("GPTNeoX")
    tokens = batch()["input_ids"]
    exact, errors = in_float64(theirs), Errors()

    def halve(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0] / 2, output[1] / 2

    plain = ours(tokens).logits
    for model in (ours, theirs, exact):
        model.gpt_neox.rotary_emb.register_forward_hook(halve)
    results = [model(tokens).logits for model in (ours, theirs, exact)]
    errors.add("logits", *results)
    errors.check()
    assert (results[0] - plain).abs().max() > 1e-3

    cache = KVCache()
    chunks = [
        ours(tokens[:, part], past_key_values=cache).logits for part in (slice(0, 3), slice(3, 4), slice(4, None))
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), results[0], rtol=1e-4, atol=1e-5)
    positions = torch.arange(tokens.shape[1])[None]
    assert torch.equal(ours(tokens, position_ids=positions).logits, results[0])


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@torch.no_grad()
def test_a_hook_may_change_the_probabilities(implementation: str) -> None:
    _, ours = pair("GPTJ")
    ours.attn_implementation = implementation
    tokens, heads = batch()["input_ids"], torch.rand(HEADS)
    expected = ours(tokens, head_mask=heads).logits
    seen = []

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output * heads[:, None, None]

    handles = [block.attn.attn_dropout.register_forward_hook(scale) for block in ours.transformer.h]
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == LAYERS and all(x.shape[1] == HEADS for x in seen)
    for handle in handles:
        handle.remove()
    assert torch.equal(ours(tokens, head_mask=heads).logits, expected) and len(seen) == LAYERS


@torch.no_grad()
def test_dropout_of_probabilities_follows_its_module() -> None:
    _, ours = pair("GPTJ", attn_pdrop=0.5)
    tokens = batch()["input_ids"]
    expected = ours.eval()(tokens).logits
    for block in ours.transformer.h:
        block.attn.attn_dropout.train()
    assert not torch.allclose(ours(tokens).logits, expected)
    for block in ours.transformer.h:
        block.attn.attn_dropout.p = 0.0
    assert torch.equal(ours(tokens).logits, expected)
