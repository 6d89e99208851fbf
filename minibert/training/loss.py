"""The training loss of a batch: from the model's logits, or where kernels run in one kernel with the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minibert.model.bert import BertForSequenceClassification
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import PackedInput
from minibert.problem.problem import MULTI, SINGLE, Problem


@dataclass(frozen=True)
class BatchLoss:
    """What a batch's loss is computed with, besides the batch."""

    problem: Problem
    class_weights: Tensor | None  # see `Problem.loss_sum`
    smoothing: float
    denominator: Tensor  # scalar: the sum of what the step's examples count

    def __call__(
        self, model: BertForSequenceClassification, x: PackedInput, targets: Tensor, keep: Tensor, masks: DropoutMasks
    ) -> Tensor:
        """The sum of the rows' losses over the denominator; `keep` [B] is 0 for rows that only fill the batch up."""
        if masks.kernels and fits_the_kernel(model, x):
            return self._in_one_kernel(model, x, targets, keep, masks)
        logits = model.logits(x, masks)
        losses = self.problem.loss_sum(logits, targets, self.class_weights, self.smoothing, keep)
        return losses / self.denominator

    def _in_one_kernel(
        self, model: BertForSequenceClassification, x: PackedInput, targets: Tensor, keep: Tensor, masks: DropoutMasks
    ) -> Tensor:
        from minibert_kernels.head import head_loss
        from minibert_kernels.linear import linear

        first_tokens = model.encoder.first_tokens(x, masks, model.cls_only)  # [B, H]
        pooler, out = model.pooler.dense, model.classifier.out
        of_head = masks.of_layer(len(model.encoder.layers))
        loss, _ = head_loss(
            linear(first_tokens, pooler.weight),
            pooler.bias,
            out.weight,
            out.bias,
            targets=targets,
            denominator=self.denominator,
            kind=self.problem.kind,
            class_weights=self.class_weights,
            smoothing=self.smoothing,
            unit=self.problem.target_scale,
            keep=keep,
            p=model.classifier.dropout,
            rng=of_head.rng,
            site=of_head.next_site(),
        )
        return loss


def fits_the_kernel(model: BertForSequenceClassification, x: PackedInput) -> bool:
    """Whether the head is one linear layer on few enough labels, and each row a text of its own."""
    from minibert_kernels.head import MOST_LABELS

    return model.classifier.dense is None and model.num_labels <= MOST_LABELS and x.window_weights is None


def least_believed(problem: Problem, logits: Tensor) -> Tensor:
    """Logits [B, L] -> the targets, [B] or [B, L], whose loss is largest, or for numbers at least 1 in their unit."""
    if problem.kind == SINGLE:
        return logits.argmin(1)
    if problem.kind == MULTI:
        return (logits <= 0).float()
    return logits[:, 0] + logits[:, 0].abs() + problem.target_scale
