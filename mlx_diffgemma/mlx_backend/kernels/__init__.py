"""The operations of a step, one per file: ``<op>_ops`` in plain MLX, ``<op>_kernel`` as a Metal kernel; equal results."""
