"""transformers on the same texts in the same batches: its Trainer as it comes, and a loop that gets the best out of it.

The loop does what minibert's does: it builds its batches, follows a linear schedule, clips to a norm of 1, and reads
the loss once a window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibert.batching.tokens import Tokens, flat_indices
from minibert.training.plan import planned_batches

from .clock import Windows, peak_gigabytes, synchronize
from .minibert_steps import LOG_LINES, run_config
from .workloads import Encoded, Setting, Workload, bert_config, encode, tflops

LEARNING_RATE = 5e-5


def make_model(setting: Setting, size: str, attention: str) -> Any:
    """A BERT of the same size, random weights, on the device, in training mode."""
    import transformers

    avoid_cudnn_attention()
    config = transformers.BertConfig(**bert_config(setting, size).source)  # of two labels, if nothing else is said
    factory: Any = transformers.AutoModelForSequenceClassification
    with setting.device:
        return factory.from_config(config, attn_implementation=attention).train()


def avoid_cudnn_attention() -> None:
    """With a mask its gradients may be NaN since torch 2.11 (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def make_optimizer(model: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """Fused AdamW without decay of vectors, and a schedule of linear warm-up and decay."""
    from transformers import optimization

    decayed = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    scheduler: Any = optimization.get_linear_schedule_with_warmup
    return optimizer, scheduler(optimizer, steps // 10, steps)


def pad(tokens: Tokens, labels: np.ndarray, rows: np.ndarray, multiple: int) -> dict[str, Tensor]:
    """The rows padded to the longest of them, rounded up to a multiple; in pinned memory where a GPU is."""
    lengths = tokens.lengths[rows]
    longest = -(-int(lengths.max()) // multiple) * multiple
    real = np.arange(longest) < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = tokens.ids[flat_indices(tokens.offsets, rows)]
    arrays = {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": labels[rows]}
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: t.pin_memory() for name, t in batch.items()} if torch.cuda.is_available() else batch


def batches(encoded: Encoded, workload: Workload, multiple: int = 8) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(tokens, padded batch) of minibert's own plan, epoch after epoch."""
    config, lengths = run_config(workload), encoded.tokens.lengths
    for epoch in count():
        for rows in planned_batches(lengths, config, epoch):
            yield int(lengths[rows].sum()), pad(encoded.tokens, encoded.labels, rows, multiple)


def make_step(model: Any, steps: int, mode: str = "") -> Callable[[dict[str, Tensor]], Tensor]:
    """A step of a run of so many, on a padded batch of the host's, with autocast to bf16; it returns the loss.

    mode: of torch.compile, which is left out without one.
    """
    forward = torch.compile(model, mode=mode, dynamic=mode == "default") if mode else model
    optimizer, schedule = make_optimizer(model, steps)
    device = model.device

    def step(batch: dict[str, Tensor]) -> Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach().clone()  # a graph's next replay writes there again

    return step


def train(
    setting: Setting, size: str, workload: Workload, attention: str = "sdpa", mode: str = "", multiple: int = 8
) -> dict[str, Any]:
    """Figures of a loop at its best; `multiple`: of tokens, that batches are padded to."""
    workload = workload.tiny() if setting.smoke else workload
    encoded, windows = encode(setting, workload), Windows(setting.smoke)
    step = make_step(make_model(setting, size, attention), LOG_LINES * workload.steps, mode)
    losses: list[Tensor] = []
    trained = 0
    for number, (tokens, batch) in enumerate(batches(encoded, workload, multiple), start=1):
        losses.append(step(batch))
        trained += tokens
        if number % workload.steps == 0:
            mean = float(torch.stack(losses).mean())  # waits for the device
            losses.clear()
            if windows.end(number, trained, mean):
                break
    return with_rate(setting, size, encoded, windows.figures())


def with_rate(setting: Setting, size: str, encoded: Encoded, figures: dict[str, Any]) -> dict[str, Any]:
    rate = {"tflops": tflops(setting, size, encoded, figures["tokens_per_second"])}
    return figures | rate | peak_gigabytes() | {"texts": setting.corpus().name}


def train_with_trainer(setting: Setting, size: str, workload: Workload) -> dict[str, Any]:
    """Figures of transformers' Trainer with its defaults: fp32, random batches padded to their longest text."""
    import transformers

    workload = workload.tiny() if setting.smoke else workload
    encoded, windows = encode(setting, workload), Windows(setting.smoke)
    tokens, rows = encoded.tokens, []
    for (start, end), label in zip(pairwise(tokens.offsets), encoded.labels, strict=True):
        ids = tokens.ids[start:end].tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(label)})

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % workload.steps == 0:
                synchronize()
                trained = state.global_step // workload.steps * int(tokens.lengths.sum())
                control.should_training_stop = windows.end(state.global_step, trained, None)

    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        transformers.Trainer(
            model=make_model(setting, size, "sdpa"),
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=workload.texts,
                max_steps=LOG_LINES * workload.steps,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(
                transformers.AutoTokenizer.from_pretrained(setting.corpus().tokenizer)
            ),
            callbacks=[Clock()],
        ).train()
    return with_rate(setting, size, encoded, windows.figures())
