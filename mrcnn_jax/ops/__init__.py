"""Pure functions of one image, of static shapes; `jax.vmap` adds the batch axis."""
