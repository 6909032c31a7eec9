"""Labelled images: their sources, and how they become tensors."""
