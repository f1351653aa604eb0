"""The example in C++ on a GPU: the package launches its kernels there, without Python."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_program_without_python_computes_what_the_model_does(dtype: str, tmp_path: Path) -> None:
    """Built without CMake, which would ask for CUDA's compiler."""
    spec = importlib.util.spec_from_file_location("cpp_export", EXAMPLE / "export.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([str(tmp_path), "--dtype", dtype, "--device", "cuda"])
    assert not (tmp_path / "ops").exists()

    libraries = Path(torch.__file__).parent / "lib"
    command = [
        *("c++", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        *(f"-I{path}" for path in include_paths()),
        *(str(EXAMPLE / "main.cpp"), "-o", str(tmp_path / "run")),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed"),
        *("-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [tmp_path / "run", tmp_path], capture_output=True, text=True, env={"TMPDIR": str(tmp_path)}
    )
    assert "4 of 4 agree" in done.stdout, done.stdout + done.stderr
    linked = subprocess.run(["ldd", tmp_path / "run"], capture_output=True, text=True).stdout
    assert "libpython" not in linked
