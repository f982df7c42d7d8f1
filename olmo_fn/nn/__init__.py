"""The pieces of a model: for each, a function that declares its parameters and a pure function that uses them."""
