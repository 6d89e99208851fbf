"""The training loop, its steps, optimisers, checkpoints to resume from."""
