"""--push-to-hub: a run's model, card and metrics as a repository of the Hugging Face Hub, and no text of the data."""

from __future__ import annotations

from pathlib import Path

from minibert.errors import UserError
from minibert.filenames import (
    CARD,
    CHECK,
    GITIGNORE,
    METRICS,
    MODEL_FILES,
    ONNX,
    ONNX_INT8,
    RECORD,
    REPORT,
    SEARCH,
    SEARCH_JOURNAL,
    SEEDS,
    SPLITS,
    TENSORBOARD,
    TRACKERS,
    TRAIN_LOG,
)
from minibert.runtime.files import one_line, write_text

PUBLISHED = (*MODEL_FILES, CARD, METRICS, ONNX, ONNX_INT8)
# They hold texts of the data, or names of files and folders.
FILES_AT_HOME = ("predictions-*.csv", REPORT, RECORD, CHECK, SPLITS, TRAIN_LOG, TRACKERS, SEEDS, SEARCH, SEARCH_JOURNAL)
KEPT_HOME = (*FILES_AT_HOME, "checkpoints/", f"{TENSORBOARD}/", "seed-*/", "trial-*/")


def write_gitignore(folder: Path) -> None:
    """Let git, and the Hub's own tools, leave out what is not to be published."""
    lines = ["# texts of the data, and paths of the computer that trained on them", *KEPT_HOME]
    write_text(folder / GITIGNORE, "\n".join(lines) + "\n")


def check_hub(name: str) -> None:
    """UserError for a name that no repository may have, or where nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"--push-to-hub {name}: {one_line(error)}") from None
    if get_token() is None:
        raise UserError("--push-to-hub: not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool | None = None) -> str:
    """Upload what `PUBLISHED` names into the repository `name`, made if it is missing; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub(name)
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            allow_patterns=[*PUBLISHED],
            commit_message="Upload a model trained with minibert",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--push-to-hub {name}: {one_line(error)[:200]}; the model is in {folder}, and "
            f"minibert.load(folder).push_to_hub(name) tries again"
        ) from None
    return str(repository)
