"""The command line ``mhf-compiler``.

commands    ``explain``, ``bench``, ``build-ops``, ``info`` and ``doctor``
inputs      models by their factories, tensors by dtype and shape
bench       timings of a model or a site, as written and rewritten
doctor      versions, card, kernels, and what is broken
"""
