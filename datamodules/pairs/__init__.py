"""Images with captions: their sources, and how a pair becomes tensors."""
