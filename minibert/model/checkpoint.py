"""Pretrained weights in, trained weights out: one table of names, read both ways.

Any checkpoint of BERT's architecture loads (`BertModel`, `BertForSequenceClassification`, `BertForMaskedLM`,
`BertForPreTraining`), and what is saved loads in transformers. Weights are safetensors only: a pickle can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification, BertModel
from minibert.model.config import MOST_LABELS, BertConfig
from minibert.runtime.ambient import default_torch_state
from minibert.runtime.files import atomic, check_regular_file, one_line, read_json, write_json, writing
from minibert.version import __version__

# Theirs -> ours, `{}` for the layer's number. A name with three rows of theirs is the fused query, key, value.
NAMES = {
    "embeddings.word_embeddings.weight": "encoder.embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "encoder.embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "encoder.embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm": "encoder.embeddings.norm",
    "encoder.layer.{}.attention.self.query": "encoder.layers.{}.qkv",
    "encoder.layer.{}.attention.self.key": "encoder.layers.{}.qkv",
    "encoder.layer.{}.attention.self.value": "encoder.layers.{}.qkv",
    "encoder.layer.{}.attention.output.dense": "encoder.layers.{}.attention_output",
    "encoder.layer.{}.attention.output.LayerNorm": "encoder.layers.{}.attention_norm",
    "encoder.layer.{}.intermediate.dense": "encoder.layers.{}.intermediate",
    "encoder.layer.{}.output.dense": "encoder.layers.{}.output",
    "encoder.layer.{}.output.LayerNorm": "encoder.layers.{}.output_norm",
    "pooler.dense": "pooler.dense",
}
HEAD_NAMES = {"classifier": "classifier.out"}
MLP_HEAD_NAMES = {"classifier.dense": "classifier.dense", "classifier.out_proj": "classifier.out"}
# Present in other BERT checkpoints and of no use here.
IGNORED = ("embeddings.position_ids", "cls.predictions.", "cls.seq_relationship.", "fit_dense")  # the last: TinyBERT's
MAY_BE_NEW = ("pooler.", "classifier.")
OWN_HEAD = "the mlp head is minibert's own: transformers refuses this folder as a classifier"
# In a file with an mlp head, of size 0. Else transformers would find no classifier, and put a random one in its place.
NO_LINEAR_HEAD = "classifier.weight"

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DOWNLOADS = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors"]
DOWNLOADS += ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "added_tokens.json"]
DOWNLOADS += ["README.md"]  # licence and language, for the card of what is made from it

Model = TypeVar("Model", BertModel, BertForSequenceClassification)


@dataclass
class LoadReport:
    """What became of the checkpoint's tensors, for one line of summary."""

    loaded: int = 0
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.loaded} tensors loaded · new: {_names(self.new)} · ignored: {_names(self.ignored)}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def model_folder(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or a download of the hub repository of that name."""
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"expected the folder of a model, not {type(name).__name__}")
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    is_path = str(name).startswith(".") or (len(folder.parts) == 2 and folder.parent.is_dir())
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or folder.exists():
        raise UserError(f"{name}: no such model folder; give one with config.json and model.safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADS))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        why = one_line(error).partition(" An error happened")[0][:120]
        raise UserError(
            f"{name}: not a local folder and not found on the Hub ({why}); "
            "give a folder with config.json and model.safetensors, or check the name and the network"
        ) from None


@default_torch_state()
def load_model(
    name: str | Path,
    kind: type[Model],
    *,
    num_labels: int | None = None,
    mlp_size: int | None = None,
    new_head: bool = False,
    seed: int = 42,
    dropout: float | None = None,
    head_dropout: float | None = None,
) -> tuple[Model, LoadReport]:
    """Build a model and fill it from a folder or hub id; parameters are fp32, in evaluation mode, on the CPU.

    `new_head` leaves the checkpoint's classifier where it is. The errors are `UserError`.
    """
    folder = model_folder(name)
    config = BertConfig.from_file(folder / CONFIG)
    if dropout is not None:
        config = replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if head_dropout is not None:
        config = replace(config, classifier_dropout=head_dropout)
    with torch.device("meta"):
        model: Any
        if kind is BertModel:
            model = BertModel(config)
        else:
            size = saved_mlp_size(config) if mlp_size is None else mlp_size
            labels = saved_num_labels(config) if num_labels is None else num_labels
            model = BertForSequenceClassification(config, labels, size)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors, report = _rename(read_weights(folder), shapes, folder, new_head)
    generator = torch.Generator().manual_seed(seed)
    for name in report.new:
        tensors[name] = _initial(name, shapes[name], config, generator)
    model.load_state_dict(tensors, assign=True, strict=True)
    return model.requires_grad_(True).eval(), report


def saved_num_labels(config: BertConfig) -> int:
    labels = config.source.get("id2label")
    count = len(labels) if isinstance(labels, dict) and labels else config.source.get("num_labels", 2)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MOST_LABELS:
        raise UserError(f"{CONFIG}: num_labels {str(count)[:40]}: expected a whole number from 1 to {MOST_LABELS}")
    return count


def saved_mlp_size(config: BertConfig) -> int:
    """Hidden units of the head that minibert saved; 0 for a plain linear one."""
    ours = config.source.get("minibert")
    size = ours.get("mlp_size", 0) if isinstance(ours, dict) else 0
    return size if type(size) is int and 0 <= size < 1 << 16 else 0  # true is an int, too


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, sharded or not, as fp32."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        return _read_shards(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        made_by = _auto_class(folder)
        if pickled:
            raise UserError(
                f"{folder / pickled[0]}: pickled weights can run code and are not read; convert with transformers: "
                f"{made_by}.from_pretrained(folder).save_pretrained(folder)"
            )
        advice = f"pickled ones convert by transformers' {made_by}.from_pretrained(name).save_pretrained(folder)"
        raise UserError(f"{folder}: no {WEIGHTS} here; give a model folder with {CONFIG} and {WEIGHTS}; {advice}")
    return _read_file(folder / WEIGHTS)


def _auto_class(folder: Path) -> str:
    """The class of transformers that keeps a checkpoint's head."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    classifies = "ForSequenceClassification" in str(config.get("architectures") if isinstance(config, dict) else "")
    return "AutoModelForSequenceClassification" if classifies else "AutoModel"


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{folder / INDEX}: no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or not shard.isprintable():
            raise UserError(f"{folder / INDEX}: {shard!r} is not a plain file name; a shard must lie in the folder")
        if not _lies_in(folder, folder / shard):
            raise UserError(f"{folder / shard}: a link out of the folder; a shard must lie in it")
        tensors |= _read_file(folder / shard)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise UserError(f"{folder / INDEX}: the shards lack {_names(missing)}; fetch the model again")
    return tensors


def _lies_in(folder: Path, path: Path) -> bool:
    """Whether a shard is in its folder, or where the hub's cache keeps the files that its folders link to."""
    home = path.resolve().parent
    cached = folder.resolve().parent.name == "snapshots" and home == folder.resolve().parents[1] / "blobs"
    return home == folder.resolve() or cached


def _read_file(path: Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        check_regular_file(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                tensor = file.get_tensor(name)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
                if not torch.isfinite(tensors[name].sum()) and not torch.isfinite(tensors[name]).all():
                    raise UserError(f"{path}: {name} holds NaN or infinity; fetch the file again")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({one_line(error)}); fetch the file again") from None
    return tensors


def _rename(
    theirs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path, new_head: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Checkpoint names to ours, with every tensor accounted for: used, new, ignored on purpose, or an error."""
    report = LoadReport()
    unused = {_modern(name): name for name in theirs}
    if NO_LINEAR_HEAD in unused and not theirs[unused[NO_LINEAR_HEAD]].numel():
        del unused[NO_LINEAR_HEAD]
    tensors: dict[str, Tensor] = {}
    for ours, names in _names_of(shapes).items():
        found = [theirs[unused.pop(name)] for name in names if name in unused and not (new_head and is_head(ours))]
        if not found and ours.startswith(MAY_BE_NEW):
            report.new.append(ours)
            continue
        if len(found) < len(names):
            raise UserError(f"{folder}: the checkpoint lacks {' or '.join(names)}")
        expected = [shapes[ours][0] // len(names), *shapes[ours][1:]]
        for name, tensor in zip(names, found, strict=True):
            if list(tensor.shape) != expected:
                raise UserError(f"{folder}: {name} is {list(tensor.shape)} where {expected} is expected")
        tensors[ours] = found[0] if len(found) == 1 else torch.cat(found)
        report.loaded += len(found)
    for name, original in unused.items():
        unwanted_head = is_head(name) and (new_head or not any(is_head(ours) for ours in shapes))
        if not (unwanted_head or name.startswith(IGNORED)):
            raise UserError(f"{folder}: unknown tensor {original}; minibert loads BERT encoders and text classifiers")
        report.ignored.append(original)
    return tensors, report


def is_head(name: str) -> bool:
    return name.startswith("classifier.")


def _modern(name: str) -> str:
    """One spelling for each tensor: no `bert.` in front, LayerNorm's weight and bias by today's names."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _names_of(parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each parameter of ours its name in a checkpoint, or the three of query, key and value."""
    mlp = "classifier.dense.weight" in parameters
    names: dict[str, list[str]] = {}
    for theirs, ours in (NAMES | (MLP_HEAD_NAMES if mlp else HEAD_NAMES)).items():
        for suffix in ("",) if theirs.endswith(".weight") else (".weight", ".bias"):
            layer = 0
            while (name := ours.format(layer) + suffix) in parameters:
                names.setdefault(name, []).append(theirs.format(layer) + suffix)
                layer += 1
                if "{}" not in ours:
                    break
    return names


def _initial(name: str, shape: tuple[int, ...], config: BertConfig, generator: torch.Generator) -> Tensor:
    """BERT's own initialisation for a new head or pooler."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, config.initializer_range or 0.02, generator=generator)


def their_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters under transformers' names: the table read backwards."""
    parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
    result = {}
    for ours, names in _names_of(parameters).items():
        for name, tensor in zip(names, parameters[ours].chunk(len(names)), strict=True):
            prefix = "" if is_head(name) or isinstance(model, BertModel) else "bert."
            result[prefix + name] = tensor.contiguous()
    if any(name.startswith("classifier.dense.") for name in result):
        result[NO_LINEAR_HEAD] = torch.empty(0)
    return result


def save_model(folder: Path, model: BertForSequenceClassification, labels: list[str], **ours: Any) -> None:
    """Write config.json and model.safetensors as transformers reads them; `ours` goes under the key "minibert"."""
    config = dict(model.config.source) | {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_hidden_layers": model.config.num_hidden_layers,
        "problem_type": ours.pop("problem_type", "single_label_classification"),
        "hidden_dropout_prob": model.config.hidden_dropout_prob,
        "attention_probs_dropout_prob": model.config.attention_probs_dropout_prob,
        "classifier_dropout": model.config.classifier_dropout,
        "minibert": {"version": __version__, "mlp_size": model.mlp_size, "averaging_layer": model.averages, **ours},
    }
    for name in ("num_labels", "dtype", "torch_dtype"):  # the base's weights may have been in half precision
        config.pop(name, None)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, their_tensors(model), {"format": "pt"})
    write_json(folder / CONFIG, config)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(one_line(error)) from None
