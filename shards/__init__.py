"""Offline work on shard sets: build, verify, info, demo. Run as `python -m shards`."""
