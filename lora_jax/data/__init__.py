"""Datasets: one module each, interchangeable sources, and the input pipeline."""
