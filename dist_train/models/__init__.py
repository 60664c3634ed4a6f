"""Images (and text) in, logits out. Knows nothing of data or DeepSpeed."""
