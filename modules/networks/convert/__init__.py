"""Conversion of foreign weights: one key table per family, each with a parity test (test_parity_*.py)."""
