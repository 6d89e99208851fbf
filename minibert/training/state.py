"""Where a run stands, beside its weights: all that is needed to go on from there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass
class State:
    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0
    tokens: int = 0
    examples: int = 0
    skipped: int = 0
    log_bytes: int = 0  # length of train_log.jsonl at this point
    bad_in_row: int = 0  # steps skipped one after another up to here
    most_tokens: int = 0  # of a micro-batch, since memory ran out; 0: it has not

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        """ValueError or TypeError unless each field is there, of the kind it has when written."""
        state = cls(**values)
        for field in dataclasses.fields(cls):
            value = getattr(state, field.name)
            kinds = {"float": (int, float), "float | None": (int, float, type(None))}.get(str(field.type), (int,))
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{field.name} is {value!r}")
            if field.name != "best_value" and not value >= 0:  # type: ignore[operator]
                raise ValueError(f"{field.name} is {value!r}")
        return state
