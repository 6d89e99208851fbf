"""The command line: flags from `RunConfig`, errors as one line, and the `minibert` script with its subcommands."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from minibert.config import KIND_NAMES, DataSettings, RunConfig, flag_name, kind_of
from minibert.errors import UserError
from minibert.messages import messages_of_command
from minibert.runtime.files import check_regular_file, one_line
from minibert.version import __version__

# Flags of transformers' Trainer and its scripts that have no counterpart of the same meaning, and what to do.
NOT_NEEDED = "leave it out"
OF_TRAINER = {
    "warmup_steps": "--warmup-ratio is the fraction of all steps",
    "per_device_eval_batch_size": f"evaluation chooses its own batches; {NOT_NEEDED}",
    "fp16": "--precision fp16",
    "bf16": "--precision bf16, as is the default on a GPU",
    "no_cuda": "--device cpu",
    "use_cpu": "--device cpu",
    "group_by_length": "--length-buckets",
    "pad_to_max_length": f"nothing is padded; {NOT_NEEDED}",
    "do_train": NOT_NEEDED,
    "do_eval": f"{NOT_NEEDED}; --validation or --validation-split",
    "do_predict": f"{NOT_NEEDED}; --test, or minibert.predict",
    "task_name": "give the task's files: --train, --validation, --test",
    "data": "--train",
    "data_path": "--train",
    "dataset_name": "give the data's files: --train, --validation, --test",
    "test_size": "--test-split",
    "eval_strategy": "--eval-steps, or once an epoch",
    "evaluation_strategy": "--eval-steps, or once an epoch",
    "save_strategy": "--save-steps",
    "save_total_limit": f"one checkpoint is kept, the last; {NOT_NEEDED}",
    "logging_steps": f"train_log.jsonl has a hundred lines; {NOT_NEEDED}",
    "load_best_model_at_end": f"the best weights are kept; {NOT_NEEDED}",
    "cache_dir": f"the environment variable HF_HOME; {NOT_NEEDED}",
    "optim": f"it is AdamW; {NOT_NEEDED}",
}
COMMANDS = {
    "finetune": "data file -> trained model folder",
    "predict": "labels and probabilities for new text",
    "evaluate": "metrics of a saved model on a labelled file",
    "embed": "sentence embeddings",
    "export": "a model for onnxruntime",
}
OTHER_NAMES = {"train": "finetune", "fit": "finetune", "test": "evaluate", "encode": "embed", "infer": "predict"}
LARGEST_CONFIG = 1 << 18  # bytes of a --config file
TEXT_FLAGS = ("text_column", "text_pair_column", "no_header", "delimiter", "quote", "encoding", "on_bad_rows")
LABEL_FLAGS = ("label_column", "label_delimiter", "label_names")
GROUPS = ("model", "data", "tokens", "recipe", "speed", "stopping", "watching", "other")


# What stands for a flag's value in --help; elsewhere N is an integer and X any number.
PLACEHOLDERS = {
    **dict.fromkeys(("train", "validation", "test"), "FILE"),
    **dict.fromkeys(("model", "tokenizer", "output"), "FOLDER"),
    **dict.fromkeys(("text_column", "text_pair_column", "label_column", "push_to_hub"), "NAME"),
    "seeds": "1,2,3",
    "report_to": "NAME",
    "max_train_samples": "N",
    "label_names": "A,B",
    "positive_label": "LABEL",
    **dict.fromkeys(("delimiter", "quote", "label_delimiter"), "C"),
}


class ShortHelp(argparse.HelpFormatter):
    """Each flag under its first name: the other spellings are understood, and listed they would hide the rest."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            return name.replace("--", "--[no-]", 1)
        return f"{name} {self._format_args(action, str(action.metavar))}" if action.nargs != 0 else name


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, and no guessing at shortened flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": ShortHelp, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Every flag's name may be written with _ for -."""
        known = self._option_string_actions
        words = []
        for word in args:
            name, *value = word.split("=", 1)
            kebab = name.replace("_", "-")
            words.append("=".join([kebab if kebab in known else name, *value]))
        self.words = words
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+)[^:]*: ", r"\1: ", message)
        for kind, name in KIND_NAMES.items():
            message = re.sub(rf"invalid {kind.__name__} value: (.*)", rf"\1 is not {name}", message)
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            message += self._meant(unknown[1].split("=")[0])
        raise UserError(f"{message}; see {self.prog} --help")

    def _meant(self, word: str) -> str:
        """What the user may have had in mind with a word that is no flag."""
        known = self._option_string_actions
        if word.startswith("--"):
            if advice := OF_TRAINER.get(word[2:].replace("-", "_")):
                return f" ({advice})"
            close = get_close_matches(word, known, 1, 0.7)
            return f" (did you mean {close[0]}?)" if close else ""
        if word in ("True", "False", "true", "false"):
            return " (a switch has no value: --x, or --no-x)"
        before = [name for name in self.words[: self.words.index(word)] if name in known] if word in self.words else []
        if before and isinstance(known[before[-1]], Several):
            return f" (several values stand between commas: {before[-1]} A,B)"
        flags = [name for name in ("--text", "--file", "--train") if name in known]
        return f" (did you mean {' or '.join(flags)} in front of it?)"


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the user can fix it (one line says how), 130 Ctrl-C."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - closed by who started us: nobody listens
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show, such as half a character, is spelled out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with messages_of_command():
            command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        sys.stderr.close()
    except OSError as error:  # whatever no other place has put in words
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}{one_line(error.strerror or error)}; the system refuses to read or write", file=sys.stderr
        )
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it may be the one that is full, and Python flushes it again
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError):
            from minibert.runtime.device import out_of_memory  # imports torch, which then is there already

            if not out_of_memory(error):
                raise
        print("error: not enough memory; use a smaller file, model or --batch-size", file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: `minibert finetune ...` is `python -m minibert.finetune ...`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in COMMANDS:
        module = import_module(f"minibert.{arguments[0]}")
        return run_command(module.main, arguments[1:])
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if arguments and arguments[0] not in ("--help", "-h"):
        close = [OTHER_NAMES[arguments[0]]] if arguments[0] in OTHER_NAMES else []
        close = close or get_close_matches(arguments[0], COMMANDS, 1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {arguments[0]!r}; {meant}", file=sys.stderr)
        return 2
    lines = [f"  minibert {name:<9} {what}" for name, what in COMMANDS.items()]
    text = "\n".join(["usage: minibert COMMAND ...", "", *lines, "", "minibert COMMAND --help lists a command's flags"])
    asked = arguments[:1] in (["--help"], ["-h"])
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """Flags, over the keys of a --config file, over the defaults."""
    return RunConfig(**given_settings(argv))


def given_settings(argv: Sequence[str]) -> dict[str, Any]:
    """The fields of `RunConfig` that flags or a --config file name; flags win."""
    arguments = vars(run_parser().parse_args(list(argv)))
    path = arguments.pop("config", None)
    return (read_config_file(path) if path else {}) | arguments


def run_parser() -> Parser:
    parser = Parser(
        prog="python -m minibert.finetune",
        description="Fine-tune BERT on a data file. With no arguments: a demonstration on bundled data.",
        usage="python -m minibert.finetune [--train FILE] [--model FOLDER] [--output FOLDER] [flags]",
        epilog="Names may be written with _ for -, and as transformers' scripts have them (--num_train_epochs).",
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(RunConfig):
        add_flag(groups[field.metadata["group"]], field)
    groups["other"].add_argument("--config", metavar="FILE.toml", help="flags from a TOML file, same names; flags win")
    return parser


def add_flag(group: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    """One flag under its name and its aliases."""
    names = [flag_name(name) for name in (field.name, *field.metadata["aliases"])]
    kind, default = kind_of(field), field.default
    shown = "" if default in (None, ()) or isinstance(default, bool) else f" (default {default})"
    text = (field.metadata["help"] + shown).replace("%", "%%")
    if kind is bool and field.name.startswith("no_"):
        group.add_argument(*names, dest=field.name, action="store_true", help=text)
    elif kind is bool:  # with a --no- form, which overrules a --config file where the default is off, too
        group.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
    elif kind is tuple:
        group.add_argument(*names, dest=field.name, action=Several, metavar=PLACEHOLDERS[field.name], help=text)
    else:
        choices = field.metadata["choices"] or None
        placeholder = PLACEHOLDERS.get(field.name, {str: "VALUE", int: "N"}.get(kind, "X"))
        placeholder = "{" + ",".join(choices) + "}" if choices else placeholder
        group.add_argument(*names, dest=field.name, type=kind, choices=choices, metavar=placeholder, help=text)


class Several(argparse.Action):
    """A flag that may be repeated, or hold several values between commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or ()
        setattr(namespace, self.dest, (*before, *(value for value in str(values).split(",") if value)))


def add_column_flags(parser: Parser, labels: bool = False) -> None:
    """The flags of `finetune` that say where in a file the texts are, for the other commands."""
    for field in dataclasses.fields(RunConfig):
        if field.name in TEXT_FLAGS or (labels and field.name in LABEL_FLAGS):
            add_flag(parser, field)


def column_config(arguments: argparse.Namespace) -> DataSettings:
    given = {name: getattr(arguments, name, None) for name in (*TEXT_FLAGS, *LABEL_FLAGS)}
    return RunConfig(**{name: value for name, value in given.items() if value})


def read_config_file(path: str) -> dict[str, Any]:
    """The keys of a TOML file as fields of `RunConfig`; an unknown key or a value of the wrong kind is an error."""
    try:
        check_regular_file(Path(path))
        if Path(path).stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG >> 10} kB")
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({one_line(error)})") from None
    return checked_values(values, path)


def checked_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values under any of a field's names -> values of the fields' own kinds."""
    fields = {}
    for known in dataclasses.fields(RunConfig):
        for name in (known.name, *known.metadata["aliases"]):
            fields[name] = known
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        field = fields.get(name) or fields.get(name.removeprefix("no_"))
        if field is None or (name not in fields and kind_of(field) is not bool):
            close = get_close_matches(name, fields, 1)
            meant = f"did you mean {close[0]}?" if close else "the names are those of the flags"
            raise UserError(f"{where}: unknown setting {key!r}; {meant}")
        if value is not None:  # which from Python means that it is not given
            converted = _converted(value, field, where)
            result[field.name] = converted if name in fields else not converted
    return result


def _converted(value: Any, field: dataclasses.Field[Any], where: str) -> Any:
    kind = kind_of(field)
    if kind is tuple:
        items = value if isinstance(value, list | tuple) else [part for part in str(value).split(",") if part]
        return tuple(str(item) for item in items)
    if isinstance(value, bool) is not (kind is bool) or (kind is int and isinstance(value, float)):
        raise UserError(f"{where}: {field.name} = {value!r} is not {KIND_NAMES[kind]}")
    if kind is str and not isinstance(value, str | os.PathLike | int | float | dict):
        expected = "{label: weight}" if field.name == "class_weights" else "a name, a path or a number"
        raise UserError(f"{where}: {field.name} is {type(value).__name__}; expected {expected}")
    try:
        if "\0" in str(value):  # no path or name holds one
            raise ValueError
        if isinstance(value, dict) and field.name == "class_weights":
            from minibert.data.labels import label_text

            return json.dumps({label_text(label): weight for label, weight in value.items()}, default=float)
        return kind(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise UserError(f"{where}: {field.name} = {value!r} is not {KIND_NAMES[kind]}") from None


if __name__ == "__main__":
    sys.exit(main())
