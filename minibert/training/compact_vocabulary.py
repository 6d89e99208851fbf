"""Train only the embedding rows of tokens that occur in the data; the result equals training all of them.

A row that no text holds gets no gradient: AdamW only decays it, by the same factor as every other such row. So the
optimiser, clipping and checkpoints skip those rows, and the factor is applied once at the end. Of BERT's 30,522 rows a
data set of short messages holds some 7,000.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from minibert.batching.tokens import Tokens
from minibert.model.bert import BertForSequenceClassification


class CompactVocabulary:
    """The model's word embeddings cut down to the rows in use, until `expand`; token ids are renumbered in place.

    One row more is a witness that no text holds. AdamW decays it like the rows left out, so in the end it tells their
    factor. Its values spread over [1, 2) because a single number's rounding would be the same at every step.
    """

    def __init__(self, model: BertForSequenceClassification, texts: Collection[Tokens]) -> None:
        self.model = model
        self.full = self._embedding.weight.detach()  # [V, H]
        used = np.zeros(len(self.full), dtype=bool)
        for tokens in texts:
            used[tokens.ids] = True
        self.rows = torch.from_numpy(np.flatnonzero(used))  # [U]
        self.witness = torch.linspace(1, 2, self.full.shape[1] + 1)[:-1]
        compact = torch.cat([self.full[self.rows], self.witness[None]])  # [U + 1, H]
        self._embedding.weight = nn.Parameter(compact)
        self._embedding.num_embeddings = len(compact)
        numbers = np.cumsum(used, dtype=np.int32) - 1
        for tokens in texts:
            tokens.ids = numbers[tokens.ids]

    @property
    def _embedding(self) -> nn.Embedding:
        return self.model.encoder.embeddings.word_embeddings

    def expand(self) -> None:
        """Give the model its whole vocabulary back. The renumbered texts no longer fit it."""
        compact = self._embedding.weight.detach().cpu()
        full = self.full * self.decay(compact)
        full[self.rows] = compact[:-1]
        self._embedding.weight = nn.Parameter(full.to(self._embedding.weight.device))
        self._embedding.num_embeddings = len(full)

    def decay(self, compact: Tensor) -> float:
        """By how much the rows left out would have shrunk."""
        return float((compact[-1].double() / self.witness.double()).mean())


def worth_compacting(model: BertForSequenceClassification, texts: Collection[Tokens]) -> bool:
    """Only if the embeddings train and a good part of them is never used."""
    embedding = model.encoder.embeddings.word_embeddings
    used = len(np.unique(np.concatenate([np.unique(tokens.ids) for tokens in texts])))
    return embedding.weight.requires_grad and used < 0.9 * embedding.num_embeddings
