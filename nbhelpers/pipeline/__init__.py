"""Runs the notebooks through papermill, in order, and their heavy parts in several processes."""
