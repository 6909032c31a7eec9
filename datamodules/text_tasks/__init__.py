"""Labelled texts: classes, tags of words, and questions with answers."""
