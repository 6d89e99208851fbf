"""Two Python lists in five lines, here 1,000 real messages, of which every fifth is held out."""

import csv

from recipe import Recipe, made, run_recipes, shared

CODE = """import minibert

clf = minibert.finetune(texts, labels, epochs=2, learning_rate=1e-4, test_split=0.2, output="runs/lists")
print(clf.predict(["WIN a FREE prize now! Call 0900 123"])[0].label)
print(minibert.load("runs/lists").predict(["see you at eight, mum"])[0].label)"""


def messages() -> list[tuple[str, str]]:
    with open(shared("sms_spam", "spamdata_v2.csv")(), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:1000]
    return [(row["text"], "spam" if row["label"] == "1" else "ham") for row in rows]


if __name__ == "__main__":
    run_recipes(
        Recipe(
            "two-lists",
            CODE,
            {"messages.csv": made("messages.csv", messages)},
            lambda m: {"accuracy": m["test"]["accuracy"], "spam F1": m["test"]["per_class"]["spam"]["f1"]},
        )
    )
