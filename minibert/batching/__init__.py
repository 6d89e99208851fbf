"""Texts as tokens, and batches of them."""
