"""Drawing: each processor against transformers', what is drawn against its distribution, and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from generate_cases import EOS, ends, generated, talkers, theirs_generates
from model_cases import FAMILIES, VOCAB, batch

from neox_kernels.models import GenerationConfig, sampling

CPU = torch.device("cpu")
PAIRS: dict[str, tuple[Callable[[], sampling.LogitsProcessor], Callable[[], Any]]] = {
    "temperature": (lambda: sampling.temperature(0.7), lambda: transformers.TemperatureLogitsWarper(0.7)),
    "top_k": (lambda: sampling.top_k(5), lambda: transformers.TopKLogitsWarper(5)),
    "top_k of more": (lambda: sampling.top_k(500), lambda: transformers.TopKLogitsWarper(500)),
    "top_k, keep": (lambda: sampling.top_k(1, 3), lambda: transformers.TopKLogitsWarper(1, min_tokens_to_keep=3)),
    "top_p": (lambda: sampling.top_p(0.6), lambda: transformers.TopPLogitsWarper(0.6)),
    "top_p of little": (lambda: sampling.top_p(1e-6), lambda: transformers.TopPLogitsWarper(1e-6)),
    "top_p, keep": (lambda: sampling.top_p(0.01, 4), lambda: transformers.TopPLogitsWarper(0.01, min_tokens_to_keep=4)),
    "min_p": (lambda: sampling.min_p(0.1), lambda: transformers.MinPLogitsWarper(0.1)),
    "min_p of all": (lambda: sampling.min_p(1.0), lambda: transformers.MinPLogitsWarper(1.0)),
    "min_p, keep": (lambda: sampling.min_p(0.9, 5), lambda: transformers.MinPLogitsWarper(0.9, min_tokens_to_keep=5)),
    "penalty": (lambda: sampling.repetition_penalty(1.3), lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3)),
    "reward": (lambda: sampling.repetition_penalty(0.6), lambda: transformers.RepetitionPenaltyLogitsProcessor(0.6)),
    "min_length": (
        lambda: sampling.min_length(14, EOS, CPU),
        lambda: transformers.MinLengthLogitsProcessor(14, torch.tensor(EOS)),
    ),
    "min_length reached": (
        lambda: sampling.min_length(13, EOS, CPU),
        lambda: transformers.MinLengthLogitsProcessor(13, torch.tensor(EOS)),
    ),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_processors_against_transformers(name: str, ties: bool) -> None:
    ours, theirs = (make() for make in PAIRS[name])
    generator = torch.Generator().manual_seed(0)
    for tokens in (batch(seed=seed, rows=40)["input_ids"] for seed in range(5)):
        scores = torch.randn(40, VOCAB, generator=generator) * 3
        if ties:
            scores = scores.round()
        before, expected = scores.clone(), theirs(tokens, scores.clone())
        got = ours(tokens, scores)
        assert torch.equal(got, expected) and torch.equal(scores, before)


def test_a_penalty_is_for_tokens_not_for_padding() -> None:
    tokens, scores = torch.tensor([[9, 9, 1, 2], [1, 2, 9, 9]]), torch.ones(2, 12)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]], dtype=torch.bool)
    penalised = sampling.repetition_penalty(2.0, mask)(tokens, scores) < 1
    assert penalised.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_tokens_are_transformers_own(family: str) -> None:
    """With torch's global generator, so that order and arguments of all processors are the same."""
    theirs, ours = talkers(family)
    for seed in range(3):
        inputs = batch("left", seed)
        for changes in (
            {},
            {"temperature": 2.0, "top_k": 0},
            {"temperature": 3.0, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2, "min_new_tokens": 4},
            {"num_return_sequences": 3, "top_k": 7, "temperature": 5.0},
        ):
            changes = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": ends(ours, inputs), **changes}
            torch.manual_seed(seed)
            expected = theirs_generates(theirs, inputs, **changes)
            torch.manual_seed(seed)
            assert torch.equal(ours.generate(**inputs, **changes), expected)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """The statistic over tokens that are expected often enough, the others together; degrees of freedom."""
    expected = probabilities.double() * counts.sum()
    often = expected >= 5
    seen = torch.cat((counts[often].double(), counts[~often].sum()[None].double()))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    seen, wanted = seen[wanted > 1e-9], wanted[wanted > 1e-9]
    return float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1


@pytest.mark.parametrize("changes", [{"top_k": 0}, {"top_k": 12}, {"top_k": 0, "top_p": 0.7}, {"min_p": 0.2}])
def test_the_distribution_of_what_is_drawn(changes: dict[str, Any]) -> None:
    """First tokens against the model's probabilities, and second ones against those behind the first."""
    _, ours = talkers("GPTNeoX")
    tokens, count = batch(rows=1)["input_ids"], 12000
    changes = {"temperature": 2.5, "eos_token_id": (), **changes}
    output = generated(
        ours,
        input_ids=tokens,
        do_sample=True,
        seed=3,
        max_new_tokens=2,
        num_return_sequences=count,
        output_scores=True,
        **changes,
    )
    first, second = output.sequences[:, 13], output.sequences[:, 14]
    probabilities = output.scores[0].softmax(-1)
    assert (probabilities == probabilities[0]).all()
    likely = int(first.mode().values)
    for drawn, expected in (
        (first, probabilities[0]),
        (second[first == likely], output.scores[1].softmax(-1)[first == likely][0]),
    ):
        statistic, freedom = chi_square(drawn.bincount(minlength=VOCAB), expected)
        assert freedom >= 3
        # Five standard deviations above the mean; draws that heed no probability are hundreds away.
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5
        wrong, _ = chi_square(drawn.bincount(minlength=VOCAB), expected.sqrt() / expected.sqrt().sum())
        assert wrong > freedom + 5 * (2 * freedom) ** 0.5, "the test sees nothing"
        assert not (drawn.bincount(minlength=VOCAB) > 0)[expected == 0].any()


def test_seeds() -> None:
    """The same one the same tokens, whatever torch's global generator has; another one others."""
    _, ours = talkers("GPTJ")
    tokens = batch(rows=1)["input_ids"].expand(4, -1)
    draw = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 10, "eos_token_id": ()}
    runs = [ours.generate(tokens, **draw, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0].tolist()}) == 4, "rows of one prompt draw for themselves"
    assert torch.equal(torch.stack(list(ours.stream(tokens, **draw, seed=1)), 1), runs[0][:, 13:])
    config = GenerationConfig(**draw, seed=1)
    assert torch.equal(ours.generate(tokens, generation_config=config), runs[0])
    assert torch.equal(ours.generate(tokens, generation_config=config, seed=2), runs[2])


def test_cold_draws_are_greedy() -> None:
    _, ours = talkers("GPTNeoX")
    greedy = ours.generate(**batch(), max_new_tokens=8, eos_token_id=())
    for cold in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(ours.generate(**batch(), max_new_tokens=8, eos_token_id=(), do_sample=True, **cold), greedy)
