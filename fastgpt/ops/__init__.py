"""One file per op: the raw operators (schemas, fake kernels, vmap rules) and the Functions."""
