"""Fifty steps of training a swapped model in many ways: the losses of the stock model, within the numbers policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import accelerate
import peft
from model_cases import Errors
from test_swap import VOCAB, gpt_neox, gptj, parts
from transformers import Trainer, TrainingArguments

import neox_kernels

STEPS, BATCH, SEQLEN = 50, 4, 16
RATE = 1e-3


def batches() -> list[dict[str, Tensor]]:
    """Sequences that can be learnt: each counts on from its first token, by its own stride; the last are padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        first, stride = (torch.randint(1, high, (BATCH, 1), generator=generator) for high in (VOCAB, 4))
        tokens = (first + stride * torch.arange(SEQLEN)) % VOCAB
        mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
        mask[0, -3:] = 0
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})
    return found


def plain(model: Any, folder: Path, autocast: bool = False) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), RATE), []
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and model.dtype != torch.float64):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def by_autocast(model: Any, folder: Path) -> list[float]:
    return plain(model, folder, autocast=True)


def by_checkpointing(model: Any, folder: Path) -> list[float]:
    model.gradient_checkpointing_enable()
    return plain(model, folder)


def by_lora(model: Any, folder: Path) -> list[float]:
    torch.manual_seed(1)
    names = ["query_key_value"] if "neox" in type(model).__name__.lower() else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():  # B begins as zeros, and then A has no gradient
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(2))
            parameter.data = parameter.data.to(model.dtype)
    assert 0 < sum(x.requires_grad for x in wrapped.parameters()) < 20
    return plain(wrapped, folder)


def by_accelerate(model: Any, folder: Path) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in batches():
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def by_trainer(model: Any, folder: Path) -> list[float]:
    rows = [{name: x[i] for name, x in batch.items()} for batch in batches() for i in range(BATCH)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, data_seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


WAYS = [plain, by_autocast, by_checkpointing, by_lora, by_accelerate, by_trainer]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", ["gpt_neox eager", "gpt_neox sdpa", "gptj"])
def test_losses_of_fifty_steps(family: str, way: Callable[[Any, Path], list[float]], tmp_path: Path) -> None:
    def fresh(dtype: torch.dtype = torch.float32) -> Any:
        if family == "gptj":
            model = gptj(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        else:
            model = gpt_neox(attn_implementation=family.split()[1])
        return model.to(dtype).train()

    swapped = fresh()
    assert len(neox_kernels.swap(swapped).replaced) == parts(swapped)
    ours, stock, exact = (
        torch.tensor(way(model, tmp_path), dtype=torch.float64) for model in (swapped, fresh(), fresh(torch.float64))
    )
    assert ours.shape == (STEPS,) and exact[-5:].mean() < exact[:5].mean() - 0.05  # it learns
    errors = Errors()
    dtype = torch.bfloat16 if way is by_autocast else torch.float32
    errors.ours["loss"] = float((ours - exact).abs().max())
    errors.theirs["loss"] = float((stock - exact).abs().max())
    errors.floor["loss"] = float(exact.max()) * torch.finfo(dtype).eps
    errors.check()
