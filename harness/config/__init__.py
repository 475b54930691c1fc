"""What one chooses: typed fields, their checks, and Hydra's composition of them."""
