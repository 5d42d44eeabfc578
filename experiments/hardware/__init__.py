"""What a training step needs on a machine that is not at hand: memory, operations, transfers and time of every chip."""
