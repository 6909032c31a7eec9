"""Text for language models: its sources, its tokenisation (done once), and rows of tokens."""
