"""What a token costs: time and cache."""
