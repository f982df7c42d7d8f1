"""Weights of other programs, in and out: a run from a Hugging Face directory, and such a directory from a run."""
