"""Measurements of cost, one script per question; results.md has the results, devices and dates."""
