"""`BertClassifier`: fine-tuning as a scikit-learn estimator, for cross-validation, grids, pipelines and calibration.

Needs scikit-learn, which is imported here only: `from minibert.sklearn import BertClassifier`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from minibert.data.labels import label_text
from minibert.errors import UserError

if TYPE_CHECKING:
    from minibert.inference.classifier import Classifier


class BertClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A BERT classifier of texts with `fit`, `predict`, `predict_proba` and `score`.

    X is a list, array or column of texts, or of (first, second) pairs; y has one label per text, of any type.
    `model` to `device` are the settings of `minibert.finetune` under the same names; `class_weight` (None, "balanced"
    or a dict) and `random_state` have scikit-learn's. Any other setting goes into the dict `settings`.
    A fit leaves no files behind; save what it gives by `estimator.classifier_.save(folder)`.

    Fitted: `classes_`, the labels in the type and order of numpy.unique(y), and `classifier_`, a `minibert.Classifier`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        epochs: float | str = "auto",
        max_steps: int | None = None,
        learning_rate: float | str = "auto",
        batch_size: int = 32,
        max_length: int | None = None,
        truncation: str = "head",
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        label_smoothing: float = 0.0,
        dropout: float | None = None,
        freeze: str = "none",
        head: str | None = None,
        head_init: str = "probe",
        validation_split: float = 0.15,
        early_stopping_patience: int | None = None,
        device: str = "auto",
        class_weight: str | dict[Any, float] | None = None,
        random_state: int = 42,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.epochs = epochs
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_length = max_length
        self.truncation = truncation
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.label_smoothing = label_smoothing
        self.dropout = dropout
        self.freeze = freeze
        self.head = head
        self.head_init = head_init
        self.validation_split = validation_split
        self.early_stopping_patience = early_stopping_patience
        self.device = device
        self.class_weight = class_weight
        self.random_state = random_state
        self.settings = settings

    def fit(self, X: Iterable[Any], y: Iterable[Any], sample_weight: Iterable[float] | None = None) -> BertClassifier:
        """Fine-tune on the texts X and the labels y; `sample_weight` is what each row's loss counts."""
        from minibert.api import finetune

        labels = column_or_1d(_plain(y), warn=True)
        check_classification_targets(labels)
        self.classes_: np.ndarray = np.unique(labels)
        names = [label_text(label) for label in self.classes_.tolist()]
        if len(set(names)) < len(names):
            raise UserError(f"y has labels that differ only in blanks or in type: {self.classes_.tolist()}")
        with tempfile.TemporaryDirectory(prefix="minibert-") as folder:
            given = self._settings() | {"output": folder, "overwrite": True}
            of_rows = [names[i] for i in np.searchsorted(self.classes_, labels)]
            self.classifier_: Classifier = finetune(_texts(X), of_rows, sample_weight=sample_weight, **given)
        number = {name: i for i, name in enumerate(self.classifier_.problem.labels)}
        self._columns = np.array([number[name] for name in names])  # of the classifier's probabilities, by class
        return self

    def predict_proba(self, X: Iterable[Any]) -> np.ndarray:
        """[n, classes] probabilities, columns in the order of `classes_`."""
        check_is_fitted(self)
        return self.classifier_.predict_proba(_texts(X))[:, self._columns]

    def predict(self, X: Iterable[Any]) -> np.ndarray:
        """[n] labels, of the type of y."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def _settings(self) -> dict[str, Any]:
        """Our parameters under the names of `minibert.finetune`."""
        given = {"quiet": True, **self.get_params(deep=False), **(self.settings or {})}
        del given["settings"]
        given["class_weights"] = given.pop("class_weight") or "none"
        given["seed"] = given.pop("random_state")
        return given

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        return tags


def _plain(y: Any) -> Any:
    """Labels as numpy orders and compares them: of pandas' own types Python's values."""
    return np.asarray(y.to_numpy(dtype=object).tolist()) if hasattr(y, "to_numpy") else y


def _texts(X: Any) -> list[Any]:
    """Rows of a list, a column, or a table of one column of texts or two of pairs."""
    if isinstance(X, str):
        raise UserError("X: expected a list of texts, not one string; put it in brackets: [text]")
    X = X.to_numpy() if hasattr(X, "to_numpy") else X
    rows: list[Any] = X.tolist() if isinstance(X, np.ndarray) else list(X)
    if rows and all(isinstance(row, list | tuple) and len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    return rows
