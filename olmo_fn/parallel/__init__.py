"""Training on a mesh of processes: degrees on paper, connected process groups, collectives by axis."""
