"""Drawn characters: a shard set of any size without a download."""
