"""What stands before every command: its environment, its options and its streams."""
