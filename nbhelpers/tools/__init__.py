"""Commands for those who maintain the project: pre-training, search of settings, benchmarks, the full size."""
