"""A run's folder and what it shows: its files and lock, metrics, progress, plots and page."""
