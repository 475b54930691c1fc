"""Evaluation: perplexity of a token split and the measured size of the key/value cache."""
