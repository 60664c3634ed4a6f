"""Offline work on shard sets: build, adopt, verify, info, demo. Run as `python -m shards`."""
