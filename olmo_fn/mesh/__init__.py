"""Who has what: the mesh of ranks on paper and connected, placements of parameters, and collectives by axis."""
