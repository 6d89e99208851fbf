"""AdamW under the forward pass of the next step.

The update moves 28 bytes for each parameter and hardly computes, the forward pass computes and moves little: a GPU does
both at once. So a step ends with the norm of its gradients, and the update itself runs at the head of the next one, in
parts on a stream of its own, while each layer waits only for the part that holds its weights. Predicted gain on an
H200: 0.30 to 0.40 ms of a step of 2.33 ms (BERT-base, 32 texts of 25 tokens), as 0.71 ms of update lie under a forward
pass of some 0.6 ms, except for the embeddings' part, which comes before everything.

Nothing is computed differently. Backward passes start when all parts are done, so no gradient is written over before it
is read, and whatever else reads parameters or moments calls `flush` first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeferredUpdate:
    """The update of the last step, in parts, of which each belongs to a layer."""

    def __init__(
        self, update_part: Callable[[int], None], layers: list[int], stream: torch.cuda.Stream | None = None
    ) -> None:
        """layers: of each part the layer that reads it first, in ascending order. Without a stream a part is updated
        at the last moment, when its layer is reached."""
        self.update_part, self.layers, self.stream = update_part, layers, stream
        self.events = [] if stream is None else [torch.cuda.Event() for _ in layers]
        self.due = False  # whether there is an update that has not begun
        self.done = len(layers)  # parts of the one that has, on which the current stream need not wait any more

    def begin(self) -> None:
        """Start the update of all parts; where none is due, it must be one that changes nothing."""
        self.due, self.done = False, 0
        if self.stream is None:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for part, event in enumerate(self.events):
                self.update_part(part)
                event.record()

    def wait_for(self, layer: int) -> None:
        """Before a layer's weights are read: the parts up to its own."""
        while self.done < len(self.layers) and self.layers[self.done] <= layer:
            if self.stream is None:
                self.update_part(self.done)
            else:
                torch.cuda.current_stream().wait_event(self.events[self.done])
            self.done += 1

    def finish(self) -> None:
        """Wait for what has begun."""
        if self.layers:
            self.wait_for(self.layers[-1])

    def flush(self) -> None:
        """Carry out what is due, so that parameters and moments are those behind the last step."""
        if self.due:
            self.begin()
        self.finish()
