"""Train image classifiers from WebDataset shards with DALI and DeepSpeed."""

__version__ = "0.1.0"
