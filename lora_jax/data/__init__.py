"""Text data: read, split, tokenised and batched."""
