"""One thin module per command: `run(config) -> exit code`. No maths, no loops over tensors."""
