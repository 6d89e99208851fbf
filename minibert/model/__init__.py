"""BERT, its operations on packed texts, and checkpoints."""
