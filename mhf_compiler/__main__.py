"""``python -m mhf_compiler`` and the console script ``mhf-compiler``: see ``cli``."""

from __future__ import annotations

import os
import sys
import warnings


def main() -> None:
    """Run the command line; one clear line if its library is missing."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler tells when it starts
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which is not used
    try:
        from .cli.commands import commands
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print(
            "Error: the command line needs click: pip install click, or in a checkout '.[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    commands(prog_name="mhf-compiler")


if __name__ == "__main__":
    main()
