"""OLMo's small published mixes, as lines of a label and a path."""
