"""Fast forms of single operations, each behind a function with a plain definition."""
