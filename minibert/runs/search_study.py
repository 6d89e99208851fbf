"""A search under way: what is varied and how far, Optuna's study on disk, each trial's settings, and search.json."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.config import RunConfig, flag_name
from minibert.errors import UserError
from minibert.filenames import SEARCH, SEARCH_JOURNAL
from minibert.model.config import BertConfig
from minibert.reporting.results import python_call
from minibert.runtime.device import duration
from minibert.runtime.files import one_line, write_json
from minibert.training.best import LOWER_IS_BETTER

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

STUDY = "minibert"
RATES, RATES_OF_HEAD = (1e-5, 1e-3), (1e-4, 1e-2)  # the other: with --freeze all
DECAYS, DROPOUTS = (0.7, 1.0), (0.0, 0.3)
FULL_TRIALS = 3  # before a trial may be pruned
FIRST_PRUNED = 2  # evaluation: at the first one a long schedule is still warming up
NOT_OF_RECIPE = ("search", "seeds", "resume", "quiet", "overwrite", "output", "check")


@dataclass
class Search:
    """A search under way: `given` holds the flags, `start` the recipe that they come to, `space` what is varied."""

    given: RunConfig
    output: Path
    metric: str
    command: list[str]
    start: dict[str, Any]
    space: dict[str, BaseDistribution]
    study: Study
    trials: int | None  # the budget: trials, or
    seconds: float | None

    @property
    def proposed(self) -> list[FrozenTrial]:
        """All trials but those that a kill left with half of their settings, which no one trains."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]

    @property
    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.proposed if trial.state.is_finished()]

    def number(self, trial: Trial | FrozenTrial) -> int:
        """A trial's number from 1, as users see it; Optuna's own counts the half-proposed ones, too."""
        return 1 + [known.number for known in self.proposed].index(trial.number)

    @property
    def best(self) -> FrozenTrial | None:
        """The first of the best trials that came to their end."""
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        whole = [trial for trial in self.finished if trial.state.name == "COMPLETE"]
        return max(whole, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def spent(self) -> float:
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.finished)

    def is_over(self) -> bool:
        """Whether the budget leaves no room for one more trial; the first one always has it."""
        finished = self.finished
        if not finished:
            return False
        if self.seconds is None:
            return len(finished) >= (self.trials or 0)
        typical = statistics.median(trial.user_attrs.get("seconds", 0.0) for trial in finished)
        return self.spent() + typical > self.seconds

    def left(self) -> str:
        """What the search will still take."""
        if self.seconds is not None:
            return duration(max(0.0, self.seconds - self.spent()))
        finished = self.finished
        return duration(self.spent() / len(finished) * max(0, (self.trials or 0) - len(finished)))


def begin_search(
    config: RunConfig, bert: BertConfig, ready: RunConfig, metric: str, fingerprint: dict[str, Any]
) -> Search:
    """Open the search in `config.output`, or the one that --resume goes on with.

    ready: the same configuration with what was left open decided. fingerprint: what a resumed search must share with
    the one that was begun.
    """
    assert config.output is not None
    output, (trials, seconds) = Path(config.output), config.search_budget()
    given = replace(config, search=None, resume=False)
    start = starting_point(ready, bert)
    study = open_study(output, metric)
    check_same(study, output, {key: value for key, value in fingerprint.items() if key != "search"})
    space = search_space(given, start, bert)
    return Search(given, output, metric, [], start, space, study, trials, seconds)


def starting_point(ready: RunConfig, bert: BertConfig) -> dict[str, Any]:
    """The recipe of the first trial, every number of it known."""
    dropout = bert.hidden_dropout_prob if ready.dropout is None else ready.dropout
    names = ("learning_rate", "epochs", "layer_lr_decay", "head")
    return {name: getattr(ready, name) for name in names} | {"dropout": dropout}


def search_space(given: RunConfig, start: dict[str, Any], bert: BertConfig) -> dict[str, BaseDistribution]:
    """What is varied, and how far; a setting that was given stays as it is.

    With --freeze all nothing but the head learns, so that layers' rates and dropout have no effect.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    rate, epochs, alone = float(start["learning_rate"]), round(start["epochs"]), given.freeze == "all"
    low, high = RATES_OF_HEAD if alone else RATES
    heads = list(dict.fromkeys([start["head"], "linear", f"mlp:{bert.hidden_size}"]))
    space: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(min(low, rate), max(high, rate), log=True),
        "epochs": IntDistribution(max(1, epochs // 2), 2 * max(epochs, 1)),
        "layer_lr_decay": FloatDistribution(min(DECAYS[0], start["layer_lr_decay"]), DECAYS[1]),
        "dropout": FloatDistribution(DROPOUTS[0], max(DROPOUTS[1], start["dropout"])),
        "head": CategoricalDistribution(heads),
    }
    usual = RunConfig(freeze=given.freeze)
    kept = {name for name in space if getattr(given, name) != getattr(usual, name)}
    kept |= {"layer_lr_decay", "dropout"} if alone else set()
    kept |= {"epochs"} if given.max_steps else set()
    return {name: distribution for name, distribution in space.items() if name not in kept}


def open_study(output: Path, metric: str) -> Study:
    """Optuna's study in the journal of `output`, made if there is none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = output / SEARCH_JOURNAL
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=STUDY,
            direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_warmup_steps=FIRST_PRUNED),
            load_if_exists=True,
        )
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path}: not a journal of --search ({one_line(error)}); start anew without --resume") from None
    finally:
        optuna.logging.set_verbosity(before)


def check_same(study: Study, output: Path, common: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()
    begun = study.user_attrs.get("digest", digest)
    if begun != digest:
        raise UserError(
            f"--resume: {output} holds a search with other data, flags or version; give those, or start anew"
        )
    study.set_user_attr("digest", digest)


def trial_config(search: Search, number: int, params: dict[str, Any]) -> RunConfig:
    """The settings of a trial; the first one's are those that were given."""
    changed = {name: legible(value) for name, value in params.items()} if number > 1 else {}
    return replace(search.given, **changed)


def legible(value: Any) -> Any:
    """A number with as many digits as anyone would type."""
    return float(f"{value:.2g}") if isinstance(value, float) else float(value) if isinstance(value, int) else value


def trial_command(config: RunConfig, command: list[str]) -> list[str]:
    """The command line, or the call from Python, that makes a trial's model again."""
    if len(command) == 1:
        return [python_call(config)]
    usual, words = RunConfig(), ["python", "-m", "minibert.finetune"]
    for field in fields(config):
        value, name = getattr(config, field.name), flag_name(field.name)
        if field.name in NOT_OF_RECIPE or value == getattr(usual, field.name):
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


def trial_record(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as search.json has it."""
    number = search.number(trial)
    config = trial_config(search, number, trial.params)
    settings = search.start | {name: getattr(config, name) for name in search.space if number > 1}
    return {
        "number": number,
        "state": trial.state.name.lower(),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "reason": trial.user_attrs.get("reason", ""),
        "settings": settings,
        "evaluations": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "seconds": trial.user_attrs.get("seconds", 0.0),
        "command": trial_command(config, search.command),
    }


def summary_of(search: Search) -> dict[str, Any]:
    best = search.best
    return {
        "metric": search.metric,
        "part": "validation",
        "direction": "minimize" if search.metric in LOWER_IS_BETTER else "maximize",
        "budget": f"{search.trials} trials" if search.trials else f"{search.seconds:g} s",
        "searched": list(search.space),
        "best_trial": None if best is None else search.number(best),
        "command": None if best is None else trial_record(search, best)["command"],
        "trials": [trial_record(search, trial) for trial in search.finished],
        "seconds": round(search.spent(), 2),
        "flags": search.given.to_dict() | {"search": str(search.trials or f"{search.seconds:g}s")},
        "folder": os.getcwd(),
    }


def write_summary(search: Search) -> None:
    write_json(search.output / SEARCH, summary_of(search))
