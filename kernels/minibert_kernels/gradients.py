"""Where backward passes put the gradients of parameters: without an optimizer's buffer in new tensors, which autograd
adds up, and with one straight into it.

A matrix takes its gradient from the matrix product itself, which writes over what a step before has left there, or adds
to what this step's batches before have. The gradient of a vector (of LayerNorm, a bias) is a sum over rows: some
programs add up their own rows, and the partial sums of all vectors lie in one buffer, which a single launch adds up
behind the backward pass of a batch. Always in the same order, so results have equal bits from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from minibert_kernels.backend import (
    PARTIALS,
    add_partials,
    add_up,
    cdiv,
    jit,
    multiprocessors,
    on_gpu,
    tl,
)

WIDEST = 1024  # columns up to which a vector has two partial sums for each multiprocessor; wider ones have fewer


@jit(do_not_specialize=("first_block",))
def add_all_partials_kernel(
    partials_ptr,  # fp32, of all vectors
    table_ptr,  # [blocks, 5] int64, see `Gradients`
    grad_ptr,  # the flat buffer, to which the sums are added
    first_block,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program: a block of columns of one vector."""
    entry = table_ptr + (first_block + tl.program_id(0)) * 5
    rows, stride = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    width = tl.load(entry + 4).to(tl.int32)
    add_up(partials_ptr + tl.load(entry), grad_ptr + tl.load(entry + 3), rows, stride, width, ROWS, COLS)


class Slot:
    """The partial sums of one vector."""

    def __init__(self, partials: Tensor) -> None:
        self.partials = partials  # [programs, size] fp32; a backward pass that uses them writes all
        self.written = False  # in this backward pass, and not yet added up


class Gradients:
    """The gradients of all parameters in one flat buffer, for the kernels' backward passes.

    Marks each parameter with its part of the buffer (`main_grad`), a vector with its `Slot`, and a matrix with this
    object, whose `first` says that a step's first batch is computed: then matrices write over what is there.
    """

    def __init__(self, flat: Tensor, parameters: Sequence[Tensor], views: Sequence[Tensor]) -> None:
        """views: the parameters' parts of `flat`."""
        self.flat, self.first = flat, True
        for parameter, view in zip(parameters, views, strict=True):
            parameter.main_grad = view  # type: ignore[attr-defined]
            parameter.gradients = self  # type: ignore[attr-defined]
        # In order of size, so that what is written in one backward pass lies together.
        vectors = sorted(((p, v) for p, v in zip(parameters, views, strict=True) if v.dim() == 1), key=_size)
        rows = [slot_rows(view) for _, view in vectors]
        starts = [0, *accumulate(r * len(view) for r, (_, view) in zip(rows, vectors, strict=True))]
        self.partials = torch.empty(starts[-1], dtype=torch.float32, device=flat.device)
        self.slots, self.blocks, table = [], [0], []
        for (parameter, view), count, start in zip(vectors, rows, starts, strict=False):
            size = len(view)
            slot = Slot(self.partials[start : start + count * size].view(count, size))
            parameter.slot = slot  # type: ignore[attr-defined]
            self.slots.append(slot)
            for column in range(0, size, PARTIALS[1]):
                place = view.storage_offset() + column
                table.append([start + column, count, size, place, min(PARTIALS[1], size - column)])
            self.blocks.append(len(table))
        self.table = torch.tensor(table, dtype=torch.int64).view(-1, 5).to(flat.device)

    def add_partials(self) -> None:
        """Add the partial sums of the backward pass that has just ended to the vectors' gradients."""
        rows, cols = PARTIALS if on_gpu(self.flat) else (4, PARTIALS[1])
        for start, stop in self._written():
            add_all_partials_kernel[(stop - start,)](
                self.partials, self.table, self.flat, start, ROWS=rows, COLS=cols, num_warps=8
            )
        self.forget()

    def forget(self) -> None:
        """Drop partial sums of a backward pass that broke off."""
        for slot in self.slots:
            slot.written = False

    def _written(self) -> Iterator[tuple[int, int]]:
        """Ranges of blocks whose slots are written."""
        for written, numbers in groupby(range(len(self.slots)), key=lambda number: self.slots[number].written):
            group = list(numbers)
            if written:
                yield self.blocks[group[0]], self.blocks[group[-1] + 1]


def _size(vector: tuple[Tensor, Tensor]) -> int:
    return len(vector[1])


def slot_rows(vector: Tensor) -> int:
    """How many programs' sums a vector's slot holds."""
    if not on_gpu(vector):
        return 3
    return cdiv(2 * multiprocessors(vector) * WIDEST, max(WIDEST, len(vector)))


class PartialSums:
    """Partial sums for some vectors that one kernel computes: in their slots, or in a tensor of its own.

    programs: how many the kernel likes to run. Where the slots have as many rows or more, it runs one for each row.
    `columns`, of a single vector, are those that the kernel computes; others are another launch's, so that its slot is
    taken whatever its rows.
    """

    def __init__(self, vectors: Sequence[Tensor], programs: int, columns: slice | None = None) -> None:
        self.vectors, self.columns = vectors, slice(None) if columns is None else columns
        slots = [slot for vector in vectors if (slot := getattr(vector, "slot", None)) is not None]
        rows = {len(slot.partials) for slot in slots}
        enough = len(slots) == len(vectors) and len(rows) == 1 and (columns is not None or programs <= min(rows))
        self.own: list[Tensor] | None = None
        if enough:
            (self.programs,), self.parts = rows, [slot.partials[:, self.columns] for slot in slots]
            for slot in slots:
                slot.written = True
            return
        self.programs = programs
        shapes = [(len(group), programs, len(group[0][self.columns])) for group in self._groups()]
        self.own = [torch.empty(shape, dtype=torch.float32, device=vectors[0].device) for shape in shapes]
        self.parts = [part for own in self.own for part in own]  # each [programs, columns] fp32

    def add(self) -> list[Tensor | None]:
        """Add them up unless their slots are added up later; what autograd is then given of each vector."""
        if self.own is None:
            return [None] * len(self.vectors)
        given: list[Tensor | None] = []
        for own, group in zip(self.own, self._groups(), strict=True):
            buffers, grads = zip(*map(grad_buffer, group), strict=True)
            add_partials(own, *(buffer[self.columns] for buffer in buffers))
            given += grads
        return given

    def _groups(self) -> list[list[Tensor]]:
        """Neighbours of equal size, which one launch adds up."""
        return [list(group) for _, group in groupby(self.vectors, key=len)]


class SharedGradient:
    """The gradient of a tensor that a linear layer reads and that is the residual behind it, too.

    The norm behind the residual has its backward pass first and leaves its part here; the layer's product is then added
    to it by the product itself, instead of by a launch of autograd's.
    """

    def __init__(self) -> None:
        self.of_residual: Tensor | None = None

    def with_product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right + the residual's part."""
        residual, self.of_residual = self.of_residual, None
        return left @ right if residual is None else residual.addmm_(left, right)


def grad_buffer(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a backward pass adds a parameter's gradient up, and what it then returns of it.

    An optimizer that keeps all gradients in one buffer marks each parameter with its part as `main_grad`: a kernel adds
    there by itself, and autograd has nothing left to add. Without one, it is a new tensor that autograd is given.
    """
    buffer = getattr(parameter, "main_grad", None)
    if buffer is not None:
        return buffer, None
    fresh = torch.zeros_like(parameter)
    return fresh, fresh


def add_product(parameter: Tensor, left: Tensor, right: Tensor, rows: slice) -> Tensor | None:
    """Add left @ right to some rows of a matrix's gradient; returns what autograd is given of it.

    A step's first batch writes over what is there (beta = 0), so nothing has to be cleared before.
    """
    buffer, grad = grad_buffer(parameter)
    gradients = getattr(parameter, "gradients", None)
    if gradients is not None and gradients.first:
        torch.mm(left, right, out=buffer[rows])
    else:
        buffer[rows].addmm_(left, right)
    return grad
