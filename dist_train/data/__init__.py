"""Shards in, batches out: manifest, plan, decode, augment. Knows nothing of models or DeepSpeed."""
