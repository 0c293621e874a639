"""The subcommands of `mrcnn`, one file each; `mrcnn_jax.__main__` finds them by name."""
