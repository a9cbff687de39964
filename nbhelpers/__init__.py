"""Helpers behind six notebooks that take a fine-tuned GPT-2 apart and prove what it can live without."""

import warnings

# Libraries that draw bars with tqdm.auto warn in JupyterLab when ipywidgets are missing; ours are plain text.
warnings.filterwarnings("ignore", message="IProgress not found")
