"""The mathematics of the method: pure functions on tensors, no I/O, no model, no configuration."""
