"""Pure functions of static shapes, most of one image: `jax.vmap` adds the batch axis."""
