"""The run folder, its shards and its provenance."""
