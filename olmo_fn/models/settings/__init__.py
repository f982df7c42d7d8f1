"""What a model is made of, as frozen settings: mixers, feed-forward networks, norms, blocks. Imports no torch."""
