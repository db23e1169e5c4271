"""Trees of adapters put together: stacked and selected by row, gated, combined, made plain LoRA."""
