"""The losses of the heads, as the families define them; in float32, whatever the logits are in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_kernels.models.forward import may_look, require_integers

IGNORED = -100  # a label that counts for nothing


def require_labels(labels: Tensor | None, shape: tuple[int, ...], classes: int) -> None:
    """Integers of ``shape``, each a class or IGNORED."""
    if labels is None:
        return
    require_integers("labels", labels, shape)
    if may_look(labels):
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise IndexError(f"labels must be between 0 and {classes - 1}, or {IGNORED}, not {wrong[0].item()}")


def require_sequence_labels(labels: Tensor | None, batch: int, classes: int, problem_type: str | None) -> None:
    """One class, or a number for each class, of every sequence."""
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, not a {type(labels).__name__}")
    problem, shape = _problem(labels, classes, problem_type), tuple(labels.shape)
    one, each = ((batch,), (batch, 1)), (batch, classes)
    if problem == "single_label_classification":
        if shape not in one:
            raise ValueError(f"labels must be ({batch},) for {problem}, not of shape {shape}")
        require_labels(labels, shape, classes)
    elif shape not in ((*one, each) if classes == 1 else (each,)):
        raise ValueError(f"labels must be {each} for {problem}, not of shape {shape}")
    elif not labels.is_floating_point() and problem == "multi_label_classification":
        raise TypeError(f"labels must be floating for {problem}, not {labels.dtype}")


def _problem(labels: Tensor, num_labels: int, problem_type: str | None) -> str:
    if problem_type is None and num_labels == 1:
        return "regression"
    several = labels.is_floating_point() or labels.dtype == torch.bool
    return problem_type or ("multi_label_classification" if several else "single_label_classification")


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token given those before it: ``labels`` (batch, seqlen) are shifted here."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return F.cross_entropy(
        logits.float().flatten(0, 1), shifted.flatten().long().to(logits.device), ignore_index=IGNORED
    )


def sequence_classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Of ``logits`` (batch, num_labels): regression, single-label or multi-label classification.

    Where ``problem_type`` is None, one label means regression, integer labels one class of several, and others several
    classes at once.
    """
    num_labels = logits.shape[-1]
    labels = labels.to(logits.device)
    problem_type = _problem(labels, num_labels, problem_type)
    if problem_type == "regression":
        labels = labels if labels.is_floating_point() else labels.to(logits.dtype)
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if num_labels == 1 else F.mse_loss(logits, labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, num_labels), labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels)


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``logits`` (batch, seqlen, num_labels)."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten().long().to(logits.device), ignore_index=IGNORED
    )


def span_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean of the cross entropies of both ends of a span; an end behind the sequence counts for nothing."""
    seqlen = start_logits.shape[1]
    losses = [
        F.cross_entropy(logits, positions.reshape(-1).long().to(logits.device).clamp(0, seqlen), ignore_index=seqlen)
        for logits, positions in ((start_logits, starts), (end_logits, ends))
    ]
    return (losses[0] + losses[1]) / 2
