"""How good a result is: retrieval, probes of frozen features, entities, answers to questions."""
