"""One thin module per command: `run(config) -> exit code`."""
