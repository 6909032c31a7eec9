"""Text for language models: where it comes from, how it is tokenised once, and how it becomes rows of tokens."""
