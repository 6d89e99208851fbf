"""minibert: fine-tune BERT for text classification, fast. Importing it costs nothing; torch loads on first use."""

from __future__ import annotations

from importlib import import_module
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
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minibert' has no attribute {name!r}")
