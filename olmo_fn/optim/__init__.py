"""Optimizers, each a pair of pure functions of one parameter, how several make one step, and learning-rate schedules."""
