"""Metrics: retrieval, probes of frozen features, entities, answers to questions, generated and recognised texts."""
