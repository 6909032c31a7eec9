"""Pairs of texts for an encoder-decoder: their sources, and how a pair becomes tokens."""
