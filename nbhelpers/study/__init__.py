"""What the notebooks compute: each result an artefact of a run that is found again."""
