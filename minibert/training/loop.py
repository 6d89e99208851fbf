"""The training loop: steps, evaluations, the best weights, checkpoints. What a step computes is in step.py."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import flat_indices
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.inference.logits import compute_logits
from minibert.model.bert import BertForSequenceClassification
from minibert.problem.problem import Problem
from minibert.runtime import distributed
from minibert.runtime.device import Hardware, duration, none_if_oom, peak_memory
from minibert.training.best import BestWeights, checked_metric
from minibert.training.log import TrainLog, Watch, open_log, record_signals
from minibert.training.plan import PlannedStep, micro_batches, plan_steps, total_steps
from minibert.training.state import State
from minibert.training.step import make_step

SECONDS_BETWEEN_SAVES = 60  # at an evaluation
LONGEST_WITHOUT_SAVE = 900  # seconds, evaluation or not
BAD_STEPS = 10  # so many losses or gradients in a row that are not finite end the run
SKIP_CHECK_INTERVAL = 50  # steps on a GPU: to read which were skipped, the host waits for it
ROWS_NAMED = 8
STEPS_TIMED = 10  # before a run says how long it will take


class Diverged(UserError):
    """Losses are not finite: the recipe is at fault, not the data or the hardware."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; a checkpoint has been written."""


class Training:
    """One training job: the model and its optimiser, the data, and where it stands."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        problem: Problem,
        data: dict[str, Dataset],
        config: RunConfig,
        hardware: Hardware,
        class_weights: np.ndarray | None = None,
        say: Callable[[str], object] = lambda line: None,
        head_is_fitted: bool = False,
    ) -> None:
        """head_is_fitted: the model before the first step is worth an evaluation that may turn out the best."""
        self.say, self.head_is_fitted = say, head_is_fitted
        self.model, self.problem, self.data = model.to(hardware.device), problem, data
        self.config, self.class_weights = config, class_weights
        self.state = State()
        self.metric = checked_metric(problem, config, data["train"].targets)
        self.best = BestWeights(self.metric)
        self.recent_losses: list[Tensor] = []  # of the steps since the last line of the log
        self.unchecked: list[tuple[PlannedStep, Tensor]] = []  # steps of which is not yet known whether they counted
        self.shown: dict[str, str] = {}  # beside the progress bar
        self.steps_per_epoch = len(self.steps_of_epoch(0))
        self.total_steps = total_steps(self.steps_per_epoch, config)
        given = (self.model, problem, config, hardware, self.total_steps, class_weights, data["train"])
        self.body, why_eager = make_step(*given)
        self.optimizer, self.hardware = self.body.optimizer, self.body.hardware
        if why_eager:
            self.say(why_eager)

    def run(self, log_path: Path, save: Callable[[], None], watch: Watch = lambda line: None) -> None:
        """Train to the end; the model then holds the best weights.

        save: writes a checkpoint of this object. watch: is given each line of the log; what it raises ends the run.
        """
        self._fit_into_memory()
        log_every = max(1, self.total_steps // 100)
        last_save = time.monotonic()
        eta_at = self.state.step + STEPS_TIMED
        stop_request = distributed.StopRequest()
        log_file = open_log(log_path, self.state.log_bytes, watch)
        with record_signals() as signals, log_file as log, self._progress_bar() as bar:
            if self.head_is_fitted and self.state.step == 0 and "validation" in self.data:
                self._evaluate(log, bar)
            for planned in self.remaining_steps():
                loss, norm = self.step(planned)
                self.recent_losses.append(loss)
                self.unchecked.append((planned, self.optimizer.bad.clone()))
                bar.update(planned.examples)
                at_end = self.state.step == self.total_steps
                if self.state.step == eta_at:
                    self._report_eta()
                if self.hardware.device.type == "cpu" or self.state.step % SKIP_CHECK_INTERVAL == 0 or at_end:
                    self._count_bad_steps()
                if self.state.step % log_every == 0 or at_end:
                    self._log_step(log, bar, norm)
                evaluated = self._evaluation_due(at_end)
                if evaluated:
                    self._evaluate(log, bar)
                self.state.log_bytes = log.bytes
                since_save = time.monotonic() - last_save
                due = self._save_due() or since_save > (SECONDS_BETWEEN_SAVES if evaluated else LONGEST_WITHOUT_SAVE)
                at_end = at_end or self._out_of_patience()
                stop = stop_request.anywhere(bool(signals))
                if stop or distributed.broadcast(due) or at_end:
                    self._count_bad_steps()
                    log.sync()  # the checkpoint counts on the log being there
                    save()
                    last_save = time.monotonic()
                if stop and not at_end:
                    stop_request.close()
                    raise Interrupted
        stop_request.close()
        self._finish()

    def _finish(self) -> None:
        """Say how the training ended, and put the best weights into the model."""
        self.optimizer.flush()
        if self.state.step < self.total_steps:
            patience = f"{self.config.early_stopping_patience} evaluations without a better {self.metric}"
            self.say(f"stopped at step {self.state.step} of {self.total_steps}: {patience}")
        if self.body.report():
            self.say(self.body.report())
        if self.state.step == int(self.optimizer.skipped) > 0 and self.optimizer.loss_scale is None:
            raise Diverged("no step had a finite loss and gradient, so nothing was learned; lower --learning-rate")
        self.best.restore_to(self.model)

    # -- steps --------------------------------------------------------------------------------------------------------

    def steps_of_epoch(self, epoch: int) -> list[PlannedStep]:
        return plan_steps(self.data["train"], self.problem, self.config, self.class_weights, epoch)

    def remaining_steps(self) -> Iterator[PlannedStep]:
        """The steps from where the run stands to its end, epoch after epoch."""
        epoch_start = 0
        for epoch in itertools.count():
            steps = self.steps_of_epoch(epoch)
            for step in steps[max(0, self.state.step - epoch_start) :]:
                if self.state.step >= self.total_steps or self._out_of_patience():
                    return
                yield step
            epoch_start += len(steps)

    def step(self, planned: PlannedStep) -> tuple[Tensor, Tensor]:
        """Train on one step, in smaller micro-batches from where memory runs out; returns (mean loss, gradient norm).

        Losses are summed and divided as before, so the effective batch is the same; only dropout draws differ.
        """
        started = time.perf_counter()
        train, number, result = self.data["train"], self.state.step, None
        while result is None:
            rows = micro_batches(planned, train.lengths, self.state.most_tokens)
            with self.hardware.computing(), self.body.errors():
                result = none_if_oom(lambda rows=rows: self.body.run(train, rows, number, planned.denominator))  # type: ignore[misc]
            if result is None:
                self._shrink(planned, rows)
        self.state.step += 1
        self.state.tokens += planned.tokens
        self.state.examples += planned.examples
        self.state.seconds += time.perf_counter() - started
        return result

    def _fit_into_memory(self) -> None:
        """See on a GPU whether the largest batch fits before the first step, and cut batches until it does."""
        if self.hardware.device.type == "cpu":
            return
        train, fits = self.data["train"], False
        largest = max(self.steps_of_epoch(0), key=lambda step: step.tokens)
        while not fits:
            rows = micro_batches(largest, train.lengths, self.state.most_tokens)
            with self.hardware.computing(), self.body.errors():
                fits = none_if_oom(lambda rows=rows: self._forward_backward(rows)) is not None  # type: ignore[misc]
            if not fits:
                self._shrink(largest, rows)
        self.optimizer.drop_gradients()

    def _forward_backward(self, rows: list[np.ndarray]) -> bool:
        self.body.forward_backward(self.data["train"], rows, self.state.step)
        return True

    def _shrink(self, planned: PlannedStep, rows: list[np.ndarray]) -> None:
        """From here on micro-batches of half the tokens that memory could not hold; UserError for a single example."""
        self.body.free_memory()
        if max(len(each) for each in rows) == 1:
            raise UserError(
                f"not enough memory to train on one example; {self._where(planned)}; "
                "use a smaller --max-length or model"
            )
        tokens = max(int(self.data["train"].lengths[each].sum()) for each in rows if len(each) > 1)
        self.state.most_tokens = tokens // 2
        self.say(f"memory ran out at step {self.state.step + 1}: micro-batches now of {tokens // 2} tokens")

    def _count_bad_steps(self) -> None:
        """Count steps skipped in a row; after BAD_STEPS the run ends, and its last checkpoint stays as it is."""
        found = torch.stack([bad for _, bad in self.unchecked]).tolist() if self.unchecked else []  # waits once
        for (planned, _), bad in zip(self.unchecked, found, strict=True):
            self.state.bad_in_row = self.state.bad_in_row + 1 if bad else 0
            if self.state.bad_in_row == BAD_STEPS:
                raise Diverged(
                    f"loss or gradient not finite for {BAD_STEPS} steps in a row, up to step {self.state.step}; "
                    f"{self._where(planned)}; look at these rows, or lower --learning-rate. The last checkpoint is good"
                )
        self.unchecked = []

    def _where(self, planned: PlannedStep) -> str:
        """The lines of a step's rows in their file."""
        data, rows = self.data["train"], np.sort(np.concatenate(planned.batches))
        lines = [data.lines[row] if data.lines else int(row) for row in rows]
        named = ", ".join(map(str, lines[:ROWS_NAMED])) + (", ..." if len(lines) > ROWS_NAMED else "")
        return f"the last batch holds {data.source or 'training'} rows {named}"

    # -- evaluations and checkpoints ----------------------------------------------------------------------------------

    def _evaluation_due(self, at_end: bool) -> bool:
        if "validation" not in self.data:
            return False
        return at_end or self.state.step % (self.config.eval_steps or self.steps_per_epoch) == 0

    def _save_due(self) -> bool:
        """Every --save-steps, but not amid steps that are skipped: the last good checkpoint is the one to keep."""
        every = self.config.save_steps
        return every is not None and self.state.step % every == 0 and not self.state.bad_in_row

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _evaluate(self, log: TrainLog, bar: tqdm[Any]) -> None:
        """Evaluate on the validation rows, log it, and keep the weights if they are the best so far."""
        parameters = self.trained_parameters()
        self._synchronize()
        data = self.data["validation"]
        logits = compute_logits(self.model, data, self.hardware, all_ranks=True)
        metrics = self.problem.tuned(logits, data.targets).metrics(logits, data.targets)
        sound = bool(np.isfinite(logits).all())  # argmax makes something of NaN, but no diverged weights are the best
        value = distributed.broadcast(metrics[self.metric] if sound else None)  # nodes may round, but must agree
        value = self.best.note(value, logits, parameters, self.state)
        numbers = {name: v for name, v in metrics.items() if isinstance(v, float | int)}
        line = {f"validation_{name}": v if math.isfinite(v) else None for name, v in numbers.items()}
        log.write({"step": self.state.step, "epoch": self.epoch, **line})
        self.shown[self.metric] = f"{value:.4f}"
        bar.set_postfix(self.shown, refresh=False)

    def trained_parameters(self) -> list[tuple[str, Tensor]]:
        """By name, as the last step left them."""
        self.optimizer.flush()
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps beside `state`, by name."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.weights.items()}
        for name, parameter in self.trained_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.moments(parameter).items():  # exp_avg, exp_avg_sq, step
                # Fixed shapes count the steps of all parameters in one tensor, and a file takes no memory twice.
                tensors[f"{key}.{name}"] = value.clone() if key == "step" else value
        tensors |= self.optimizer.counters()
        if self.recent_losses:
            tensors["recent_losses"] = torch.stack(self.recent_losses)
        return tensors

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Go back to where `state` and `tensors` were taken."""
        device, keys = self.hardware.device, ("exp_avg", "exp_avg_sq", "step")
        with torch.no_grad():
            for name, parameter in self.trained_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                if f"exp_avg.{name}" in tensors:
                    self.optimizer.restore(parameter, {key: tensors[f"{key}.{name}"].to(device) for key in keys})
                if f"best.{name}" in tensors:
                    self.best.weights[name] = tensors[f"best.{name}"].to(device)
            for name, counter in self.optimizer.counters().items():
                counter.copy_(tensors[name])
            self.optimizer.refresh()
        self.recent_losses = list(tensors.get("recent_losses", torch.empty(0)).to(device))
        self.state = state

    # -- what the user sees -------------------------------------------------------------------------------------------

    def _log_step(self, log: TrainLog, bar: tqdm[Any], norm: Tensor) -> None:
        """Write the loss since the last line, and what goes with it; this waits for the device."""
        self._synchronize()
        loss = float(torch.stack(self.recent_losses).mean())
        self.recent_losses = []
        self.state.skipped = int(self.optimizer.skipped)
        line = {
            "step": self.state.step,
            "epoch": self.epoch,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": self.optimizer.learning_rate,
            "grad_norm": float(norm) if math.isfinite(float(norm)) else None,
            "tokens_per_second": round(self.state.tokens / max(self.state.seconds, 1e-9), 1),
        }
        log.write(line)
        bar.set_description(f"epoch {self.epoch:.1f} loss {loss:.4f}", refresh=False)
        self.shown["tokens/s"] = f"{line['tokens_per_second']:.0f}"
        bar.set_postfix(self.shown, refresh=False)

    def _report_eta(self) -> None:
        """Say what is to be expected, by the steps so far; --check says it before, of evaluations too."""
        if self.config.quiet:
            return
        self._synchronize()
        device, epochs = self.hardware.device, self.total_steps / self.steps_per_epoch
        spent = self.state.seconds - self.body.setup_seconds
        seconds = spent / self.state.tokens * int(self.data["train"].lengths.sum()) * epochs
        memory = f"{peak_memory(device) / 2**30:.1f} GiB of {'GPU ' * (device.type == 'cuda')}memory so far"
        self.say(f"expect  {duration(seconds)} for {self.total_steps} steps; {memory}")

    def _synchronize(self) -> None:
        """Wait for the device, so that its time counts as training and not as what comes next."""
        if self.hardware.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()
            self.state.seconds += time.perf_counter() - started

    def _progress_bar(self) -> tqdm[Any]:
        total = round(self.total_steps / self.steps_per_epoch * len(self.data["train"]))
        hidden = True if self.config.quiet else None  # None: only on a terminal
        return tqdm(total=total, initial=self.state.examples, unit=" examples", disable=hidden, leave=False)

    @property
    def epoch(self) -> float:
        return round(self.state.step / self.steps_per_epoch, 4)

    def padding_fractions(self) -> tuple[float, float]:
        """Of the first epoch's batches, the padding inside attention and in all else, as fractions of all rows."""
        tokens, inside, elsewhere = self.data["train"].tokens, 0, 0
        for rows in (rows for step in self.steps_of_epoch(0) for rows in step.batches):
            lengths = tokens.lengths[rows if tokens.windows is None else flat_indices(tokens.windows, rows)]
            packed, slots = self.body.padded_sizes(lengths)
            inside, elsewhere = inside + slots, elsewhere + packed
        return 1 - len(tokens.ids) / inside, 1 - len(tokens.ids) / elsewhere
