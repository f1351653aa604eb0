"""The example in C++: a model that was packaged here runs there, without Python."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.forks import run_code
from support.library import ops_library

import mhf_compiler

__all__ = ["ops_library"]

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
needs_cmake = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "c++"))), reason="needs CMake and a C++ compiler"
)

#: what PyTorch's CMake files say where it is missing
NO_TOOLKIT = "uses CUDA but I cannot find the CUDA libraries"

LOADED_WITHOUT_THE_OPS = """
import sys, torch
try:
    torch._inductor.aoti_load_package(sys.argv[1])
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def folder(ops_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example's script has written: a package in bfloat16 with a router in float32."""
    made = tmp_path_factory.mktemp("cpp")
    spec = importlib.util.spec_from_file_location("cpp_export", EXAMPLE / "export.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def build_ops(where: Path) -> Path:
        """The library of the other tests, which takes ten seconds to build."""
        shutil.copytree(ops_library.parents[1], where)
        return where / "lib" / ops_library.name

    # Optimised or not, the wrapper is the same program.
    not_optimised = torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})
    with pytest.MonkeyPatch.context() as patch, not_optimised:
        patch.setattr(mhf_compiler, "build_ops", build_ops, raising=False)
        patch.setattr(example, "LAYERS", 1)
        example.main([str(made), "--dtype", "bfloat16"])
    return made


def output_of(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        list(map(str, command)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_cmake
def test_a_program_without_python_computes_what_the_model_does(folder: Path):
    """It runs without an environment, so that it finds neither Python nor a compiler."""
    prefix = f"{torch.utils.cmake_prefix_path};{folder / 'ops'}"
    configure = (
        *("cmake", "-S", EXAMPLE, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}"),
        # The default of some distributions, which drops libraries whose names are not used.
        "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed",
    )
    done = subprocess.run(list(map(str, configure)), capture_output=True, text=True)
    if NO_TOOLKIT in " ".join(done.stderr.split()):
        pytest.skip("PyTorch is built for CUDA, whose toolkit its CMake files ask for")
    assert done.returncode == 0, done.stderr
    output_of("cmake", "--build", folder)
    assert "4 of 4 agree" in output_of(folder / "run", folder, env={})
    assert "libpython" not in output_of("ldd", folder / "run")


def test_a_package_without_the_ops_says_what_it_lacks(folder: Path):
    """In a Python process that has imported nothing of ours, and likewise in C++."""
    done = run_code(LOADED_WITHOUT_THE_OPS, folder / "model.pt2")
    assert done.returncode == 0, done.stderr
    assert "Could not find schema for mhf_compiler::" in done.stdout
