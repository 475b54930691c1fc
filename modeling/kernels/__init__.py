"""Scaled dot-product attention behind one signature."""
