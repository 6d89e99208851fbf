"""minibert: fine-tune BERT for text classification, fast. Importing it costs nothing; torch loads on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minibert.version import __version__ as __version__

if TYPE_CHECKING:
    from minibert.api import finetune as finetune
    from minibert.inference.classifier import Classifier as Classifier
    from minibert.inference.classifier import Prediction as Prediction
    from minibert.inference.classifier import load as load
    from minibert.model.bert import BertForSequenceClassification as BertForSequenceClassification
    from minibert.model.bert import BertModel as BertModel

__all__ = ["BertForSequenceClassification", "BertModel", "Classifier", "Prediction", "finetune", "load"]

_HOMES = {
    "finetune": "minibert.api",
    "BertModel": "minibert.model.bert",
    "BertForSequenceClassification": "minibert.model.bert",
    "Classifier": "minibert.inference.classifier",
    "Prediction": "minibert.inference.classifier",
    "load": "minibert.inference.classifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minibert' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


class _Package(ModuleType):
    """Importing the command's module, minibert/finetune.py, does not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "finetune" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
