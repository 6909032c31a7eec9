"""Recordings for recognition and classification: files, log-mel features, augmentation, transcripts."""
