"""From noise to a file: guidance, the Euler loop, and media output."""
