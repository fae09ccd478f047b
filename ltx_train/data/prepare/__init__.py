"""Media and captions to latents, text contexts and shards; restartable and content-addressed."""
