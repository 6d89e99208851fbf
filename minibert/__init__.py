"""minibert: fine-tune BERT for text classification, fast. Importing it costs nothing; torch loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert import finetune as finetune
    from minibert.inference.classifier import Classifier as Classifier
    from minibert.inference.classifier import Prediction as Prediction
    from minibert.inference.classifier import load as load
    from minibert.model.bert import BertForSequenceClassification as BertForSequenceClassification
    from minibert.model.bert import BertModel as BertModel

__version__ = "0.1.0"
__all__ = ["BertForSequenceClassification", "BertModel", "Classifier", "Prediction", "finetune", "load"]

_HOMES = {
    "BertModel": "minibert.model.bert",
    "BertForSequenceClassification": "minibert.model.bert",
    "Classifier": "minibert.inference.classifier",
    "Prediction": "minibert.inference.classifier",
    "load": "minibert.inference.classifier",
}


def __getattr__(name: str) -> Any:
    if name == "finetune":  # the module behind `python -m minibert.finetune`, and callable
        return import_module("minibert.finetune")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minibert' has no attribute {name!r}")
