"""The real texts that all rows share: packed beforehand from the data sets, or those bundled with minibert."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

from minibert.errors import UserError
from minibert.run import DEMO_DATA
from minibert.runs.setup import demo_weights

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
VOCABULARY_SIZE = 30_522
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
TRAIN, VALIDATION, MINILM = "sst2-train.csv", "sst2-dev.csv", "minilm"  # in a packed folder
MOST_MEGABYTES = 60


@dataclass(frozen=True)
class Corpus:
    """Labelled texts in CSV files (columns text and label) and the folder of a tokenizer."""

    name: str
    train: Path
    validation: Path | None  # None: to be split off
    tokenizer: Path
    minilm: Path | None  # pretrained weights

    def texts(self) -> list[str]:
        with open(self.train, encoding="utf-8", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]


def load_corpus(packed: Path | None, scratch: Path) -> Corpus:
    """What `pack` wrote to `packed`; without it minibert's demonstration messages, with a vocabulary of their own."""
    if packed is None:
        tokenizer = train_tokenizer(scratch / "tokenizer")
        return Corpus("bundled messages, a vocabulary trained on them", DEMO_DATA, None, tokenizer, None)
    missing = [name for name in (TRAIN, VALIDATION, MINILM) if not (packed / name).exists()]
    if missing:
        raise UserError(f"--packed {packed}: no {', '.join(missing)} there; write the folder with --pack")
    return Corpus("SST-2 sentences", packed / TRAIN, packed / VALIDATION, packed / MINILM, packed / MINILM)


def train_tokenizer(folder: Path) -> Path:
    """A WordPiece vocabulary of the bundled messages, filled up to BERT's size with tokens that never occur."""
    if (folder / "vocab.txt").exists():
        return folder
    from tokenizers import BertWordPieceTokenizer

    with open(DEMO_DATA, encoding="utf-8", newline="") as file:
        messages = [row["text"] for row in csv.DictReader(file)]
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(messages, vocab_size=VOCABULARY_SIZE, min_frequency=1, show_progress=False)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens += [f"[unused{i}]" for i in range(VOCABULARY_SIZE - len(tokens))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    return folder


def pack(folder: Path) -> float:
    """Write SST-2 and MiniLM (weights in half precision) to a folder that can be carried; returns its megabytes."""
    if not (SHARED / "sst2").is_dir():
        raise UserError(f"--pack: no data sets in {SHARED}; bring them there, or measure without --packed")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in (("train.tsv", TRAIN), ("dev.tsv", VALIDATION)):
        write_csv(SHARED / "sst2" / source, folder / target)
    copy_in_half_precision(Path(demo_weights()), folder / MINILM)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if megabytes > MOST_MEGABYTES:
        raise UserError(f"--pack: {folder} holds {megabytes:.0f} MB, more than {MOST_MEGABYTES}; give a new folder")
    return megabytes


def write_csv(source: Path, target: Path) -> None:
    """SST-2's sentence<TAB>label lines as CSV with a header."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    with open(target, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])


def copy_in_half_precision(source: Path, target: Path) -> None:
    """A model folder with fp16 weights, which rounds them by at most 0.05%."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copyfile(source / name, target / name)
    tensors = load_file(source / "model.safetensors")
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
