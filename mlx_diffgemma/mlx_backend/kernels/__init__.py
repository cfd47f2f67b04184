"""The operations of a step: ``<op>_ops`` in plain MLX and ``<op>_kernel`` as a Metal kernel, equal, one op per file."""
