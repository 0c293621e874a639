"""See mrcnn_jax/commands/train.py, or `python train.py --help`."""

from mrcnn_jax.commands.train import command

if __name__ == "__main__":
    command()
