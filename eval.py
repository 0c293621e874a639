"""`mrcnn eval` of a checkout: see `python eval.py --help`."""

from mrcnn_jax.__main__ import script

if __name__ == "__main__":
    script("eval")
