"""The kernel of a notebook, which imports what the notebooks import before it answers.

The pipeline starts it while the notebook before is still running, so that nobody waits for these seconds.
"""

import importlib

from ipykernel import kernelapp

LIBRARIES = (
    "nbhelpers.report.panels",
    "nbhelpers.study.comparison",
    "nbhelpers.study.forgetting",
    "transformers.models.gpt2.modeling_gpt2",
)

if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    kernelapp.launch_new_instance()
