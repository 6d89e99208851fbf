"""What a model says of texts, as tables (CSV, Parquet), as JSON lines, and as lines for people."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from minibert.data.examples import Examples
from minibert.inference.classifier import Classifier
from minibert.inference.explain import Word, explain, marked, strongest
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.files import atomic, printable

# What a spreadsheet takes for the start of a formula (OWASP, "CSV Injection"), behind any number of apostrophes.
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
ROWS_PER_WRITE = 10_000  # rows that are text at a time
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


class Predicted(NamedTuple):
    """Texts with their logits and, if asked for, the effects of their words."""

    examples: Examples
    logits: np.ndarray  # [n, L]
    words: list[list[Word]] | None = None


def predict_chunks(classifier: Classifier, chunks: Iterable[Examples], with_words: bool) -> Iterator[Predicted]:
    for examples in chunks:
        logits = classifier.logits(examples.texts, examples.pairs)
        words = explain(classifier, examples.texts, examples.pairs, logits) if with_words else None
        yield Predicted(examples, logits, words)


def prediction_columns(
    predicted: Predicted, problem: Problem, targets: np.ndarray | None = None, *, top_k: int = 0
) -> dict[str, list[Any]]:
    """The table, column by column; `row` is the line a text has in its file.

    A probability for each class, or with `top_k` the most probable ones and their names. targets None: no loss.
    """
    examples, logits, words = predicted
    probabilities = problem.probabilities(logits)  # [n, L]
    table: dict[str, list[Any]] = {"row": examples.lines, "text": examples.texts}
    if examples.pairs is not None:
        table["text_pair"] = examples.pairs
    if examples.labels is not None:
        table["label"] = examples.labels
    table["predicted"] = problem.decisions(probabilities)
    if problem.kind == SINGLE:
        table["probability"] = probabilities.max(1).tolist()
    if problem.kind != REGRESSION and top_k:
        for rank, column in enumerate(most_probable(probabilities, top_k).T, start=1):
            table[f"top_{rank}"] = [problem.labels[i] for i in column]
            table[f"top_{rank}_probability"] = probabilities[np.arange(len(column)), column].tolist()
    elif problem.kind != REGRESSION:
        table |= {f"probability_{name}": probabilities[:, i].tolist() for i, name in enumerate(problem.labels)}
    if words is not None and problem.kind == MULTI:
        table["explained"] = [problem.labels[k] for k in problem.top_label(probabilities)]
    if words is not None:
        table["words"] = ["; ".join(map(str, strongest(of_text))) for of_text in words]
    if targets is not None:
        table["loss"] = problem.example_losses(logits, targets).tolist()
    return table


def prediction_records(predicted: Predicted, problem: Problem, *, top_k: int = 0) -> Iterator[dict[str, Any]]:
    """The same for JSON: an object for each text, with the classes and the words as objects in it."""
    examples, logits, words = predicted
    probabilities = problem.probabilities(logits)
    order = most_probable(probabilities, top_k) if top_k else None
    top_label = problem.top_label(probabilities)
    for i, decision in enumerate(problem.decisions(probabilities)):
        record: dict[str, Any] = {"row": examples.lines[i], "text": examples.texts[i]}
        if examples.pairs is not None:
            record["text_pair"] = examples.pairs[i]
        record["predicted"] = round(decision, 10) if isinstance(decision, float) else decision
        row = [round(float(p), 10) for p in probabilities[i]]
        if problem.kind == SINGLE:
            record["probability"] = max(row)
        if problem.kind != REGRESSION and order is not None:
            record["top"] = [{"label": problem.labels[k], "probability": row[k]} for k in order[i]]
        elif problem.kind != REGRESSION:
            record["probabilities"] = dict(zip(problem.labels, row, strict=True))
        if words is not None and problem.kind == MULTI:
            record["explained"] = problem.labels[top_label[i]]
        if words is not None:
            record["words"] = [word.to_dict() for word in words[i]]
        yield record


def most_probable(probabilities: np.ndarray, count: int) -> np.ndarray:
    """[n, L] -> [n, count] class numbers, the most probable first; of equals the earlier one."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]


def readable_lines(predicted: Predicted, problem: Problem, *, top_k: int = 0) -> Iterator[str]:
    """For people: one line a text with label, probability and text, then what --top-k and --explain add."""
    examples, logits, words = predicted
    probabilities = problem.probabilities(logits)
    for i, decision in enumerate(problem.decisions(probabilities)):
        shown = [examples.texts[i], *(examples.pairs or [])[i : i + 1]]
        if words is not None:
            shown = [marked(text, words[i], in_pair=place > 0) for place, text in enumerate(shown)]
        yield "\t".join([readable_decision(decision, probabilities[i], problem), *shown])
        for k in most_probable(probabilities[i : i + 1], top_k)[0]:
            yield f"\t{probabilities[i, k]:.4f}\t{printable(problem.labels[k])}"
        if words is not None:
            explained = printable(problem.labels[problem.top_label(probabilities[i : i + 1])[0]])
            yield f"\tfor {explained}: " + (", ".join(map(str, strongest(words[i]))) or "no word matters")


def readable_decision(decision: Any, probabilities: np.ndarray, problem: Problem) -> str:
    """A decision in a line: label and probability, each label with its own, or the number of a regression."""
    if isinstance(decision, float):
        return f"{decision:.4f}"
    if not isinstance(decision, list):
        return f"{printable(decision)}\t{probabilities.max():.4f}"
    by_name = dict(zip(problem.labels, probabilities, strict=True))
    return ", ".join(f"{printable(name)} {by_name[name]:.4f}" for name in decision) or "(none)"


def write_predictions(
    path: Path, examples: Examples, problem: Problem, logits: np.ndarray, targets: np.ndarray
) -> None:
    """predictions-*.csv of a run."""
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    with atomic(path) as temporary, open(temporary, "w", **options) as file:
        for start in range(0, len(examples), ROWS_PER_WRITE) or [0]:  # all as text would be larger than the data
            rows = np.arange(start, min(start + ROWS_PER_WRITE, len(examples)))
            table = prediction_columns(Predicted(examples.take(rows), logits[rows]), problem, targets[rows])
            write_csv(file, table, header=start == 0)


def write_csv(file: IO[str], table: dict[str, list[Any]], header: bool = True, spreadsheet_safe: bool = False) -> None:
    """The table as CSV, texts as they are; `spreadsheet_safe` guards cells that would run as formulas."""
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    if header:
        plain.writerow(table)
    cells = [[_cell(name, value, spreadsheet_safe) for value in values] for name, values in table.items()]
    for row in zip(*cells, strict=True):  # csv leaves a lone carriage return bare before Python 3.13
        writer = quoted if any("\r" in cell for cell in row if isinstance(cell, str)) else plain
        writer.writerow(row)


def _cell(name: str, value: Any, spreadsheet_safe: bool) -> Any:
    if isinstance(value, list):
        value = "|".join(value)
    if isinstance(value, str):
        is_number = name not in ("text", "text_pair") and NUMBER.fullmatch(value)  # a label like -1 is no formula
        return safe_cell(value) if spreadsheet_safe and not is_number else value
    return f"{value:.10g}" if isinstance(value, float) and name != "label" else value  # curves can be drawn from it


def safe_cell(text: str) -> str:
    """An apostrophe in front of what a spreadsheet would run as a formula; `plain_cell` takes it away again."""
    return f"'{text}" if FORMULA.match(text) else text


def plain_cell(cell: str) -> str:
    """The text that `safe_cell` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def write_text(
    file: IO[str], chunks: Iterable[Predicted], problem: Problem, *, as_csv: bool, top_k: int, spreadsheet_safe: bool
) -> int:
    """Write CSV or JSON lines, chunk by chunk as they come; returns how many rows."""
    count = 0
    for number, predicted in enumerate(chunks):
        if as_csv:
            table = prediction_columns(predicted, problem, top_k=top_k)
            write_csv(file, table, header=number == 0, spreadsheet_safe=spreadsheet_safe)
        else:
            for record in prediction_records(predicted, problem, top_k=top_k):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        count += len(predicted.examples)
    return count


def write_parquet(path: Path, chunks: Iterable[Predicted], problem: Problem, *, top_k: int) -> int:
    import pyarrow
    from pyarrow import parquet

    writer, count = None, 0
    try:
        for predicted in chunks:
            table = prediction_columns(predicted, problem, top_k=top_k)
            schema = pyarrow.schema([(name, _arrow_type(name, problem)) for name in table])
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(pyarrow.table({name: _storable(values) for name, values in table.items()}, schema))
            count += len(predicted.examples)
    finally:
        if writer is not None:
            writer.close()
    return count


def _arrow_type(name: str, problem: Problem) -> Any:
    import pyarrow

    if name == "row":
        return pyarrow.int64()
    if name.startswith("probability") or name.endswith("_probability"):
        return pyarrow.float64()
    if name == "predicted" and problem.kind == MULTI:
        return pyarrow.list_(pyarrow.string())
    is_number = name == "predicted" and problem.kind == REGRESSION
    return pyarrow.float64() if is_number else pyarrow.string()


def _storable(values: list[Any]) -> list[Any]:
    """Strings that UTF-8 can hold."""
    return [v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for v in values]
