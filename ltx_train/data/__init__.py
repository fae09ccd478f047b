"""Prepares clips into shards, and reads shards into batches."""
