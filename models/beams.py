"""Beam search: the best of several sequences of each prompt that are followed at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neox_kernels.models.outputs import GenerateOutput

if TYPE_CHECKING:
    from neox_kernels.models.generation import Run

_NONE = -1e9  # the score of what is not there: finite, so that sums and ranks stay numbers


@dataclass
class Complete:
    """The best complete sequences of each prompt, (batch, beams) each, by where they ended: the best first.

    Attributes:
        scores: what they are ranked by; ``_NONE`` of those that are not there.
        there: whether one is.
        step, parent, token: the step of the last token, which beam it continued, and the token.
    """

    scores: Tensor
    there: Tensor
    step: Tensor
    parent: Tensor
    token: Tensor

    @classmethod
    def none(cls, batch: int, beams: int, device: torch.device) -> Complete:
        zeros = torch.zeros(batch, beams, dtype=torch.long, device=device)
        return cls(torch.full_like(zeros, _NONE, dtype=torch.float32), zeros.bool(), zeros, zeros, zeros)

    def with_more(self, scores: Tensor, there: Tensor, step: int, parent: Tensor, token: Tensor) -> Complete:
        """The best of these and others, (batch, n) each."""
        scores, place = torch.cat((self.scores, scores.where(there, _NONE)), 1).topk(self.scores.shape[1])
        columns = (
            (self.there, there),
            (self.step, torch.full_like(parent, step)),
            (self.parent, parent),
            (self.token, token),
        )
        return Complete(scores, *(torch.cat(pair, 1).gather(1, place) for pair in columns))

    def read(self, parents: Tensor, tokens: Tensor, count: int, pad: int) -> tuple[Tensor, Tensor]:
        """The sequences of the best ``count``, and the beam that each of their tokens continued, -1 behind the end.

        Args:
            parents, tokens: (steps, batch, beams), of the open beams behind each step: whom they continued, and how.
        """
        step, beam = self.step[:, :count], self.parent[:, :count]
        length = int(step.max()) + 1
        sequences = torch.full((*step.shape, length), pad, device=step.device)
        beams = torch.full_like(sequences, -1)
        for at in range(length - 1, -1, -1):
            last, before = step == at, step > at
            token = torch.where(last, self.token[:, :count], tokens[at].gather(1, beam))
            parent = torch.where(before, parents[at].gather(1, beam), beam)
            sequences[..., at] = token.where(last | before, pad)
            beams[..., at] = parent.where(last | before, -1)
            beam = parent
        return sequences, beams


@torch.no_grad()
def search(run: Run) -> GenerateOutput:
    """Run beam search to its end, with the rules of transformers."""
    decoding, config, beams = run.decoding, run.config, run.config.num_beams
    steps, device, rows = decoding.total - run.first, decoding.tokens.device, decoding.tokens.shape[0]
    batch = rows // beams
    first_row = torch.arange(0, rows, beams, device=device)[:, None]
    # So many candidates that, whichever of them end, enough beams stay open.
    wide = max(2, 1 + len(config.end_tokens)) * beams
    parents = torch.zeros(steps, batch, beams, dtype=torch.long, device=device)
    tokens = torch.zeros_like(parents)
    complete = Complete.none(batch, beams, device)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    running = torch.full((batch, beams), _NONE, device=device)
    running[:, 0] = 0  # all beams begin as one
    logits = decoding.prefill()
    for step in range(steps):
        end = run.first + step
        scores = run.process(logits, end, normalized)
        vocab = scores.shape[1]
        totals = (scores.view(batch, beams, vocab) + running[..., None]).flatten(1)
        if config.do_sample:
            place = run.draw(totals, min(wide, totals.shape[1]))
            found = totals.gather(1, place)
        else:
            found, place = totals.topk(min(wide, totals.shape[1]))
        parent, token = place // vocab, place % vocab
        if step + 1 == steps:
            ends = torch.ones_like(token, dtype=torch.bool)
        else:
            ends = run.stops(decoding.new(end), token.flatten(), (parent + first_row).flatten()).view_as(token)

        # Only what ends among the first becomes complete: the others are there for those that go on.
        counts = ends & improvable
        counts[:, beams:] = False
        if config.early_stopping is True:
            counts &= ~complete.there.all(1, keepdim=True)
        ranked = found / (step + 1) ** config.length_penalty
        complete = complete.with_more(ranked, counts, step, parent, token)

        running, going_on = (found + ends * _NONE).topk(beams)
        parents[step], tokens[step] = parent.gather(1, going_on), token.gather(1, going_on)
        longest = steps if config.early_stopping == "never" and config.length_penalty > 0 else step + 1
        reachable = running[:, :1] / longest**config.length_penalty
        worst = complete.scores.min(1, keepdim=True).values.where(complete.there.all(1, keepdim=True), _NONE)
        improvable = improvable & (reachable > worst)
        go_on = improvable.any() & ~ends.all()
        if config.early_stopping is True:
            go_on &= ~complete.there.all()
        if not bool(go_on):
            break
        decoding.reorder((parents[step] + first_row).flatten(), end)
        decoding.tokens[:, end] = tokens[step].flatten()
        logits = decoding.step(end + 1)

    count = config.num_return_sequences
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    sequences, rows_of = complete.read(parents, tokens, count, pad)
    rows_of = torch.where(rows_of < 0, -1, rows_of + first_row[..., None])
    known = decoding.known(run.first).unflatten(0, (batch, beams))[:, :count]
    return run.given(
        torch.cat((known, sequences), 2).flatten(0, 1),
        sequences_scores=complete.scores[:, :count].flatten(),
        beam_indices=rows_of.flatten(0, 1),
    )


def normalized(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)
