"""Smaller batches where memory runs out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from minibert.errors import UserError
from minibert.runtime.device import none_if_oom

Result = TypeVar("Result")


def split_on_oom(
    batches: Iterable[np.ndarray], compute: Callable[[np.ndarray], Result]
) -> Iterator[tuple[np.ndarray, Result]]:
    """`compute` of each batch; one that does not fit into memory is computed in halves, and so are those after it."""
    most: int | None = None  # examples per batch, once memory has run out
    queue = deque(batches)
    while queue:
        rows = queue.popleft()
        if most is not None and len(rows) > most:
            queue.extendleft(reversed([rows[start : start + most] for start in range(0, len(rows), most)]))
            continue
        result = none_if_oom(partial(compute, rows))
        if result is not None:
            yield rows, result
        elif len(rows) == 1:
            raise UserError("not enough memory for one example; use a smaller --max-length or model")
        else:
            most = len(rows) // 2
            queue.appendleft(rows)
