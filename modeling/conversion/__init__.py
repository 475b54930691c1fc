"""From grouped-query attention to latent attention, weights to weights: layers.py holds the two forms, stages.py the steps."""
