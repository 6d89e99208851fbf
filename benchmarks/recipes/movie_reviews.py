"""Sentences of movie reviews (SST-2), linear head: the encoder frozen, then all weights trained."""

from recipe import Recipe, run_recipes, shared

FILES = {f"{part}.tsv": shared("sst2", f"{part}.tsv") for part in ("train", "dev", "test")}
FROZEN = """python -m minibert.finetune --train train.tsv --validation dev.tsv --test test.tsv --no-header \\
    --freeze all --epochs 10 --output runs/reviews-frozen"""
FULL = """python -m minibert.finetune --train train.tsv --validation dev.tsv --test test.tsv --no-header \\
    --max-train-samples 4000 --epochs 2 --learning-rate 1e-4 --output runs/reviews"""

if __name__ == "__main__":
    run_recipes(
        Recipe(
            "movie-reviews-frozen",
            FROZEN,
            FILES,
            lambda m: {"test accuracy": m["test"]["accuracy"], "dev accuracy": m["validation"]["accuracy"]},
            {"test accuracy": "about 0.81 (from memory)"},
            "published: DistilBERT's [CLS] and logistic regression on 2,000 of these sentences",
        ),
        Recipe(
            "movie-reviews-full",
            FULL,
            FILES,
            lambda m: {"test accuracy": m["test"]["accuracy"], "dev accuracy": m["validation"]["accuracy"]},
            {"dev accuracy": "0.932 BERT-base, 0.915 MiniLM-L6-H384"},
            "published: trained on all 67,000 phrases of GLUE; here 4,000 of the 6,920 sentences",
        ),
    )
