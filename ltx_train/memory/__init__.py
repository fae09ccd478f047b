"""What is traded for memory: precision of frozen weights, recomputation of activations."""
