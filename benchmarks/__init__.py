"""Benchmarks: `python -m benchmarks list`, `run` and `plot`.

    harness.py       contenders side by side: checked, then timed in turn
    results.py       rows to JSON, CSV and tables; plots.py draws them
    models.py        the networks and models that are measured, in plain PyTorch

and one file for each benchmark, which lists its cases. A new one is a file with a `BENCHMARK`, and
its name in `__main__.py`.
"""
