"""Triton kernels for training BERT, each beside the plain torch that defines it."""
