"""Text generation: what is chosen, how texts grow, and number formats that make it fast. Needs torch alone."""
