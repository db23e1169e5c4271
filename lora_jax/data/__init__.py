"""Data: reading, splitting, tokenizing and batching."""
