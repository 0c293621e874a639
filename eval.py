"""See mrcnn_jax/commands/eval.py, or `python eval.py --help`."""

from mrcnn_jax.commands.eval import command

if __name__ == "__main__":
    command()
