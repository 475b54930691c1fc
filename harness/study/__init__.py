"""Ablations: arms trained over the same seeds, compared with error bars."""
