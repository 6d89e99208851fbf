"""What the curve of a finished run says about the next one: whether it was done, and whether it learned by heart."""

from __future__ import annotations

import math
from typing import Any

WORTH = 0.002  # of the metric: a smaller gain is noise
MOST_TIMES = 3.0  # the most that more epochs are advised, as a multiple of those that were
SLOWER = 0.95  # a gain over the one before it: above, the curve is not slowing down yet
MEMORISED = 1.25  # the last validation loss over the lowest one, from which on training went too far


def advice(evaluations: list[dict[str, Any]], metric: str, lower_is_better: bool, epochs: float) -> list[str]:
    """One line for each thing that a user would do differently, none for a run that was as it should be.

    evaluations: the lines of train_log.jsonl with validation metrics, in order, those at step 0 among them.
    """
    sign = -1.0 if lower_is_better else 1.0
    curve = [(line["epoch"], line.get(f"validation_{metric}")) for line in evaluations]
    known = [(float(epoch), sign * float(value)) for epoch, value in curve if value is not None]
    lines = []
    if more := _epochs_until_done(known, epochs):
        lines.append(
            f"not done: the last evaluation was the best and {metric} was still rising; "
            f"about {more:g} epochs more may help: --epochs {round(epochs + more):g}"
        )
    values = [value for _, value in known]
    if len(values) > 1 and evaluations[0].get("step") == 0 and values[0] == max(values):
        lines.append(
            "no evaluation was better than the linear probe that training began with, which is what was kept; "
            "lower --learning-rate, or take the probe as it is with --freeze all"
        )
    if learned_by_heart(evaluations):
        lines.append(
            "validation loss rose while training loss fell: the model learned its rows by heart; "
            "more rows help, else fewer --epochs or a lower --learning-rate"
        )
    return lines


def _epochs_until_done(curve: list[tuple[float, float]], epochs: float) -> float:
    """From the last two gains, which shrink like a geometric series; 0 where nothing is to be gained."""
    values = [value for _, value in curve]
    if len(curve) < 2 or values[-1] < max(values) or values[-1] - values[-2] <= WORTH:
        return 0.0
    between = curve[-1][0] - curve[-2][0]
    gain, before = values[-1] - values[-2], values[-2] - values[-3] if len(values) > 2 else 0.0
    longest = (MOST_TIMES - 1) * epochs
    if gain > SLOWER * before:
        return float(math.ceil(min(longest, epochs)))  # as long again
    evaluations = math.log(WORTH / gain) / math.log(gain / before)
    return float(math.ceil(min(longest, max(1.0, evaluations * between))))


def learned_by_heart(evaluations: list[dict[str, Any]]) -> bool:
    """Whether the validation loss (of numbers, the squared error) ended far above its lowest."""
    for name in ("validation_loss", "validation_mse"):
        losses = [line[name] for line in evaluations if line.get(name) is not None]
        if len(losses) > 1:
            return bool(losses[-1] > MEMORISED * min(losses) and losses[-1] > losses[-2])
    return False
