"""The losses of the heads, as the families define them; in float32, whatever the logits are in."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that counts for nothing


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token given those before it: ``labels`` (batch, seqlen) are shifted here."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten().to(logits.device), ignore_index=IGNORED)


def sequence_classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Of ``logits`` (batch, num_labels): regression, single-label or multi-label classification.

    Where ``problem_type`` is None, one label means regression, integer labels one class of several, and others several
    classes at once.
    """
    num_labels = logits.shape[-1]
    labels = labels.to(logits.device)
    if problem_type is None:
        integers = not labels.is_floating_point()
        single = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if num_labels == 1 else single
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if num_labels == 1 else F.mse_loss(logits, labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, num_labels), labels.view(-1))
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise ValueError(
        "problem_type must be None, 'regression', 'single_label_classification' or 'multi_label_classification', "
        f"not {problem_type!r}"
    )


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``logits`` (batch, seqlen, num_labels)."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORED)


def span_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean of the cross entropies of both ends of a span; an end behind the sequence counts for nothing."""
    seqlen = start_logits.shape[1]
    losses = [
        F.cross_entropy(logits, positions.reshape(-1).to(logits.device).clamp(0, seqlen), ignore_index=seqlen)
        for logits, positions in ((start_logits, starts), (end_logits, ends))
    ]
    return (losses[0] + losses[1]) / 2
