"""See mrcnn_jax/commands/predict.py, or `python predict.py --help`."""

from mrcnn_jax.commands.predict import command

if __name__ == "__main__":
    command()
