"""The encoder against transformers: same weights, same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import minibert
from minibert.model.bert import BertForSequenceClassification, BertModel
from minibert.model.checkpoint import load_model
from minibert.model.config import ACTIVATIONS
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import pack_padded

LENGTHS = (17, 1, 30, 2, 30, 9)


def ragged_batch(vocab: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, vocab, shape, generator=generator),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "attention_mask": mask,
    }


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max())


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "gelu_fast"])
def test_hidden_states_equal_transformers(tiny: Callable[..., Path], activation: str) -> None:
    folder = tiny(hidden_act=activation)
    batch = ragged_batch(211)
    with torch.no_grad():
        ours = BertModel.from_pretrained(folder)(**batch)
        theirs = transformers.BertModel.from_pretrained(folder)(**batch)
    keep = batch["attention_mask"].bool()
    assert largest_difference(ours.last_hidden_state[keep], theirs.last_hidden_state[keep]) < 1e-5
    assert largest_difference(ours.pooler_output, theirs.pooler_output) < 1e-5
    assert not ours.last_hidden_state[~keep].any()


def test_mask_and_token_types_are_optional(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    ids = ragged_batch(211)["input_ids"]
    with torch.no_grad():
        ours = BertModel.from_pretrained(folder)(ids)
        theirs = transformers.BertModel.from_pretrained(folder)(ids)
    assert largest_difference(ours.last_hidden_state, theirs.last_hidden_state) < 1e-5


def test_a_mask_with_holes_equals_transformers(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    batch = ragged_batch(211, (12, 12, 12))
    batch["attention_mask"] = torch.tensor([[1, 0] * 6, [1] * 12, [1] * 3 + [0] * 6 + [1] * 3])
    with torch.no_grad():
        ours = BertModel.from_pretrained(folder)(**batch)
        theirs = transformers.BertModel.from_pretrained(folder)(**batch)
    keep = batch["attention_mask"].bool()
    assert largest_difference(ours.last_hidden_state[keep], theirs.last_hidden_state[keep]) < 1e-5


def test_logits_and_gradients_equal_transformers(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=3)
    batch = ragged_batch(211)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    ours = BertForSequenceClassification.from_pretrained(folder)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    our_logits, their_logits = ours(**batch).logits, theirs(**batch).logits
    assert largest_difference(our_logits, their_logits) < 1e-5
    torch.nn.functional.cross_entropy(our_logits, labels).backward()
    torch.nn.functional.cross_entropy(their_logits, labels).backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = {
        "encoder.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
        "encoder.embeddings.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
        "encoder.layers.0.intermediate.weight": "bert.encoder.layer.0.intermediate.dense.weight",
        "encoder.layers.2.output.weight": "bert.encoder.layer.2.output.dense.weight",
        "encoder.layers.2.attention_norm.bias": "bert.encoder.layer.2.attention.output.LayerNorm.bias",
        "pooler.dense.weight": "bert.pooler.dense.weight",
        "classifier.out.bias": "classifier.bias",
    }
    for ours_name, theirs_name in pairs.items():
        gradient = ours.get_parameter(ours_name).grad
        assert gradient is not None
        assert largest_difference(gradient, their_grads[theirs_name]) < 1e-5, ours_name
    for layer in (0, 2):
        attention = f"bert.encoder.layer.{layer}.attention.self"
        for kind in ("weight", "bias"):
            stacked = torch.cat([their_grads[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")])
            gradient = ours.get_parameter(f"encoder.layers.{layer}.qkv.{kind}").grad
            assert gradient is not None
            assert largest_difference(gradient, stacked) < 1e-5


@pytest.mark.parametrize("training", [False, True], ids=["no dropout", "dropout"])
def test_cls_only_last_layer_is_exact(tiny: Callable[..., Path], training: bool) -> None:
    """Logits and gradients of every parameter, with attention and hidden dropout off in the last layer's site order."""
    model = BertForSequenceClassification.from_pretrained(tiny("BertForSequenceClassification", num_labels=3))
    x, _ = pack_padded(model.config, **ragged_batch(211))
    if training:  # dropout in the layers below the last, none in the last, so that both ways draw the same masks
        last = model.encoder.layers[-1]
        last.attention_dropout = last.dropout = 0.0
        model.classifier.dropout = 0.0
    results = []
    for cls_only in (True, False):
        model.cls_only = cls_only
        model.zero_grad()
        logits = model.logits(x, DropoutMasks(3, 7) if training else None)
        logits.square().sum().backward()
        results.append(
            (logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (logits_a, grads_a), (logits_b, grads_b) = results
    assert largest_difference(logits_a, logits_b) < 1e-5
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:
        assert largest_difference(grads_a[name], grads_b[name]) < 1e-4 * (1 + float(grads_b[name].abs().max())), name


def test_real_weights_equal_transformers(minilm: Path) -> None:
    texts = ["hello world", "", "The quick brown fox. " * 60, "naïve café 😀 日本語", "a b c d e f g"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        ours = minibert.BertModel.from_pretrained(minilm)(**batch)
        theirs = transformers.BertModel.from_pretrained(minilm)(**batch)
    keep = batch["attention_mask"].bool()
    assert largest_difference(ours.last_hidden_state[keep], theirs.last_hidden_state[keep]) < 1e-5
    assert largest_difference(ours.pooler_output, theirs.pooler_output) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp32_than_transformers(minilm: Path, dtype: torch.dtype) -> None:
    """Root mean square errors against fp32, of hidden states and of gradients: at most twice transformers' own."""
    batch = ragged_batch(30000, lengths=(60, 33, 7, 120), seed=3)
    keep = batch["attention_mask"].bool()

    def run(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.eval()(**batch).last_hidden_state[keep]
        hidden.float().square().sum().backward()
        weight = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else None
        weight = model.encoder.embeddings.word_embeddings.weight if weight is None else weight
        return hidden.detach().float(), weight.grad.float()

    exact = run(transformers.BertModel.from_pretrained(minilm, dtype=torch.float32))
    theirs = run(transformers.BertModel.from_pretrained(minilm, dtype=dtype))
    ours = run(BertModel.from_pretrained(minilm).to(dtype))
    for value, their_value, true in zip(ours, theirs, exact, strict=True):
        error, allowed = (float((x - true).square().mean().sqrt()) for x in (value, their_value))
        assert 0 < error <= 2 * allowed


def test_wrong_input_is_a_clear_error(tiny: Callable[..., Path]) -> None:
    model = BertModel.from_pretrained(tiny())
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="length up to 64"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids must be from 0 to 210"):
        model(ids * 500)
    with pytest.raises(ValueError, match="token_type_ids must be from 0 to 1"):
        model(ids, token_type_ids=ids * 3)
    for mask in (torch.ones(2, 9), torch.ones(1, 9), torch.ones(3, 8), torch.ones(3, 1, 9)):
        with pytest.raises(ValueError, match="attention_mask is"):
            model(torch.zeros(3, 9, dtype=torch.long), mask.long())
    with pytest.raises(ValueError, match="at least one token"):
        model(ids, attention_mask=ids * 0)


def test_training_mode_applies_dropout_and_follows_torch_seed(tiny: Callable[..., Path]) -> None:
    model, _ = load_model(tiny(), BertModel)
    batch = ragged_batch(211)
    model.train()
    torch.manual_seed(5)
    first = model(**batch).pooler_output
    second = model(**batch).pooler_output
    torch.manual_seed(5)
    again = model(**batch).pooler_output
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_head_drops_elements_of_its_own_input(tiny: Callable[..., Path]) -> None:
    """With dropout before the classifier alone, logits differ from those without by what a mask takes away."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.5}
    model = BertForSequenceClassification.from_pretrained(tiny("BertForSequenceClassification", num_labels=3, **none))
    x, _ = pack_padded(model.config, **ragged_batch(211))
    with torch.no_grad():
        masks = DropoutMasks(3, 7)
        pooled = model.pooler(model.encoder.first_tokens(x, masks))
        mask, scale = masks.of_layer(3).draw(pooled.shape, 0.5, pooled)
        expected = model.classifier.out(pooled * mask * scale)
        assert largest_difference(model.logits(x, masks), expected) < 1e-5
        assert largest_difference(model.logits(x), expected) > 1e-2
