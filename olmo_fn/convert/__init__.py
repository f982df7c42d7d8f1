"""``olmo-fn convert``: runs from other programs' files, and back."""
