"""The functional core: a loss as a chain, two engines that differentiate it, the step and its pipe. Knows no model."""
