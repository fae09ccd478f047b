"""How a block runs: what it keeps, recomputation, compilation, CUDA graphs, cast adapters."""
