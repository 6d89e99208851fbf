"""Answers of a trained model: labels, embeddings, explanations, files of predictions."""
