"""What is done to the scores of the next token before one is taken, as plain callables.

Each takes the tokens so far, (rows, length), and the scores, (rows, vocab_size), and returns the new scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neox_kernels.models.generation_config import GenerationConfig

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


def repetition_penalty(penalty: float, mask: Tensor | None = None) -> LogitsProcessor:
    """Make tokens that are there less likely.

    Args:
        penalty: divides their positive scores, and multiplies their negative ones.
        mask: (rows, at least length), bool: the tokens that count; None for all.
    """

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        vocab = scores.shape[1]
        if mask is not None:
            tokens = tokens.where(mask[:, : tokens.shape[1]], vocab)
        # A column more, for what does not count.
        there = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device)
        there = there.scatter_(1, tokens, True)[:, :vocab]
        return scores.where(~there, torch.where(scores < 0, scores * penalty, scores / penalty))

    return process


def min_length(length: int, eos: Sequence[int], device: torch.device) -> LogitsProcessor:
    """Forbid the end tokens while there are fewer than ``length`` tokens."""
    index = torch.tensor(eos, device=device)

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, index, -torch.inf) if tokens.shape[1] < length else scores

    return process


def temperature(value: float) -> LogitsProcessor:
    """Divide the scores: below 1 the likely tokens become likelier."""
    return lambda tokens, scores: scores / value


def top_k(k: int, keep: int = 1) -> LogitsProcessor:
    """Forbid all but the ``k`` most likely tokens, and what is as likely as the last of them; at least ``keep``."""

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        last = scores.topk(min(max(k, keep), scores.shape[1])).values[:, -1:]
        return scores.masked_fill(scores < last, -torch.inf)

    return process


def top_p(p: float, keep: int = 1) -> LogitsProcessor:
    """Forbid all but the fewest tokens that have the probability ``p`` together; at least ``keep`` stay."""

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort()
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - p  # what is left out has at most the rest
        tail[:, -keep:] = False
        return scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)

    return process


def min_p(p: float, keep: int = 1) -> LogitsProcessor:
    """Forbid tokens of less than ``p`` times the most likely one's probability; at least ``keep`` stay."""

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        best = probabilities.topk(min(keep, scores.shape[1]))
        rare = probabilities < p * best.values[:, :1]
        return scores.masked_fill(rare.scatter(1, best.indices, False), -torch.inf)

    return process


def processors(
    config: GenerationConfig,
    own: Sequence[LogitsProcessor],
    *,
    eos: Sequence[int],
    least: int,
    mask: Tensor | None,
    device: torch.device,
) -> list[LogitsProcessor]:
    """All that a configuration asks for, in the order that transformers has.

    Args:
        own: the caller's, which come behind the penalty and before what only draws.
        eos: the end tokens.
        least: tokens of a sequence, as the processors see it, before which none of them may come.
        mask: see :func:`repetition_penalty`.
    """
    made: list[LogitsProcessor] = []
    if config.repetition_penalty != 1:
        made.append(repetition_penalty(config.repetition_penalty, mask))
    if eos and least > 0:
        made.append(min_length(least, eos, device))
    made.extend(checked(processor) for processor in own)
    if not config.do_sample:
        return made
    keep = 1 if config.num_beams == 1 else max(2, len(eos) + 1)  # a beam that ends must not leave the search empty
    if config.temperature != 1:
        made.append(temperature(config.temperature))
    if config.top_k:
        made.append(top_k(config.top_k, keep))
    if config.top_p is not None and config.top_p < 1:
        made.append(top_p(config.top_p, keep))
    if config.min_p is not None:
        made.append(min_p(config.min_p, keep))
    return made


def checked(processor: LogitsProcessor) -> LogitsProcessor:
    """The caller's, whose result must be scores again."""

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        made = processor(tokens, scores)
        if not isinstance(made, Tensor) or made.shape != scores.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"logits_processor must return scores of the shape {tuple(scores.shape)}, not {got}")
        return made

    return process


class Stops:
    """What ends a sequence.

    Args:
        eos: the end tokens.
        sequences: of tokens, of which the last ones of a sequence must be one.
        least: new tokens before which a stop sequence ends nothing; of end tokens the scores take care.
    """

    def __init__(
        self, eos: Sequence[int], sequences: Sequence[Sequence[int]], least: int, device: torch.device
    ) -> None:
        self._eos = torch.tensor(eos, dtype=torch.long, device=device)
        self._sequences = [torch.tensor(sequence, device=device) for sequence in sequences]
        self._least = least

    def __bool__(self) -> bool:
        return bool(len(self._eos) or self._sequences)

    def __call__(self, new: Tensor, last: Tensor, rows: Tensor | None = None) -> Tensor:
        """Whether a sequence ends: (n,), bool.

        Args:
            new: (rows, length), the new tokens before the last one.
            last: (n,), the last one.
            rows: (n,), which row of ``new`` it continues; default: each its own.
        """
        ended = (last[:, None] == self._eos).any(-1)
        length = new.shape[1]
        for sequence in self._sequences:
            before = len(sequence) - 1
            if length >= before and length + 1 >= self._least:
                begun = (new[:, length - before :] == sequence[:-1]).all(-1)
                ended |= (begun if rows is None else begun[rows]) & (last == sequence[-1])
        return ended
