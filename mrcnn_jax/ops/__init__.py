"""Pure functions of one image: no batch axis, no parameters, static shapes; `jax.vmap` lifts them
at the stage boundary."""
