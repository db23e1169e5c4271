"""What it costs: one script per question; the answers stand in results.md, device and date too."""
