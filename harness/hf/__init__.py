"""The world of transformers: reading its checkpoints, writing ours for it, sizes of its caches."""
