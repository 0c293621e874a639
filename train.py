"""`mrcnn train` of a checkout: see `python train.py --help`."""

from mrcnn_jax.__main__ import script

if __name__ == "__main__":
    script("train")
