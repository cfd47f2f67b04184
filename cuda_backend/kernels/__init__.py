"""Triton kernels, each beside the plain torch operations it stands for: ``<op>_ops`` and ``<op>_kernel`` in one file.

``launch.py`` starts kernels, ``language.py`` has what they share, ``cards.py`` says what each GPU can do. Nothing here
is used until ``choice.py`` has picked it, once, when a model is loaded.
"""
