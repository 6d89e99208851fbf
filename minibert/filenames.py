"""The names of the files in a run's folder, in one place."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
METRICS = "metrics.json"  # written once training and evaluation are done
RECORD = "run.json"  # written as a run begins, removed last
CHECK = "check.json"  # what --check leaves; a run may follow in the same folder
SPLITS = "splits.json"
TRAIN_LOG = "train_log.jsonl"
REPORT = "report.html"
CARD = "README.md"
GITIGNORE = ".gitignore"
ONNX, ONNX_INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"  # where transformers.js and optimum look
TRACKERS = "tracker.json"  # which runs of the trackers --resume goes on with
TENSORBOARD = "tensorboard"  # the folder of its event files
CHECKPOINTS = "checkpoints/last"  # a folder
SEEDS = "seeds.json"
SEARCH = "search.json"
SEARCH_JOURNAL = "search.journal"  # Optuna's

MODEL_FILES = (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG)


def predictions_file(part: str) -> str:
    return f"predictions-{part}.csv"
