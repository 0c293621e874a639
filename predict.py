"""`mrcnn predict` of a checkout: see `python predict.py --help`."""

from mrcnn_jax.__main__ import script

if __name__ == "__main__":
    script("predict")
