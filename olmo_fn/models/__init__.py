"""Model families: a config, the tree of its parameters' specs, and its loss as a chain of stages."""
