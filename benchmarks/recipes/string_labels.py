"""Labels that are words (TREC's six kinds of question): 80/20, weighted F1, then reload the folder and predict."""

from pathlib import Path
from typing import Any

from recipe import Recipe, made, minibert, run_recipes, trec

COMMAND = """python -m minibert.finetune --train kinds.csv --validation-split 0 --test-split 0.2 \\
    --epochs 4 --learning-rate 1e-4 --output runs/kinds"""
QUESTION, KIND = "Who wrote Hamlet ?", "HUM"


def predict(output: Path) -> dict[str, Any]:
    """The saved folder, read by another process."""
    line = minibert(str(output), "--text", QUESTION, module="predict", capture=True)
    print(f"python -m minibert.predict runs/kinds --text {QUESTION!r}\n{line}")
    return {"predicted": {"text": QUESTION, "label": line.split("\t")[0], "expected": KIND}}


if __name__ == "__main__":
    run_recipes(
        Recipe(
            "string-labels",
            COMMAND,
            {"kinds.csv": made("kinds.csv", lambda: trec("train_5500"))},
            lambda m: {"weighted F1": m["test"]["weighted_f1"], "accuracy": m["test"]["accuracy"]},
            {"accuracy": 0.968},
            "published: BERT-base with further pre-training, on the 500 test questions; here 20% of the training file",
            predict,
        )
    )
