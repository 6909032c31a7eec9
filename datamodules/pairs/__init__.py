"""Images with captions: where they come from, and how a pair becomes tensors."""
