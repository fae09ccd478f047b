"""One optimizer step over all ranks' gradients: whole, or in slices (ZeRO), and its state in checkpoints."""
