"""Text generation: sampling, beam search, filling of masks, and low-precision weights. Needs only torch."""
