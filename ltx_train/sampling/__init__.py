"""Generation, from noise to a media file: guidance, the Euler loop, and media output."""
