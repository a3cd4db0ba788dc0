"""One optimiser step: micro-batches, loss, backward, clip, update."""
