"""``python -m olmo_fn``: the same as ``olmo-fn``."""

from olmo_fn.cli.main import program

if __name__ == "__main__":
    program()
