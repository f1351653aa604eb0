"""Makes the models of ``tests/corpus`` importable as the package ``corpus``.

Not through ``sys.path``: beside the corpus lies a folder that has the name of the product.
"""

import importlib.util
import sys
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "corpus"

if "corpus" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "corpus", CORPUS / "__init__.py", submodule_search_locations=[str(CORPUS)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["corpus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["corpus"])
