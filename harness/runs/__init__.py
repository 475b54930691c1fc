"""A run's folder: claimed, trained, loaded, scored, and made of weights from elsewhere."""
