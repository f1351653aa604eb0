"""The ops as a C++ library for the CPU, for programs without Python that link it.

It computes what `lowering/cpu/blocks.cpp` computes for Python, from the same source. What else both
need is said in Python, and written into the source as constants.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from .arguments import AXES
from .cpu import compiled
from .ops.common import registered

__all__ = ["build_ops"]

_NAME = "mhf_compiler_ops"
#: what a rewritten program calls before Inductor's passes, all in inference
_OPS = {"multi_head_ffn": "kMultiHeadFfn", "router_product": "kRouterProduct"}

_CONSTANTS = """
#include <utility>

namespace {{

{schemas}
constexpr std::pair<const char*, const char*> kAxes[] = {{{axes}}};
constexpr const char* kActivations[] = {{{activations}}};
constexpr int64_t kProductsOfThread = {products};

}}  // namespace
"""

_CONFIG = """\
# find_package(mhf_compiler) defines mhf_compiler::ops. A program that links it has the ops of
# mhf_compiler for the CPU. The library calls PyTorch {torch}, for which it was built.
cmake_minimum_required(VERSION 3.18)
include(CMakeFindDependencyMacro)
if(NOT Torch_FOUND)
  find_dependency(Torch)
endif()
if(NOT Torch_VERSION VERSION_EQUAL "{torch}")
  set(mhf_compiler_FOUND FALSE)
  set(mhf_compiler_NOT_FOUND_MESSAGE
      "the ops were built for PyTorch {torch}, this is ${{Torch_VERSION}}: build them again")
  return()
endif()
if(NOT TARGET mhf_compiler::ops)
  get_filename_component(mhf_compiler_lib "${{CMAKE_CURRENT_LIST_DIR}}/../.." ABSOLUTE)
  add_library(mhf_compiler::ops SHARED IMPORTED)
  set_target_properties(mhf_compiler::ops PROPERTIES
    IMPORTED_LOCATION "${{mhf_compiler_lib}}/{file}"
    IMPORTED_SONAME "{file}"
    # A program calls the ops by their names only, which some linkers take for not at all.
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed"
    INTERFACE_LINK_LIBRARIES "${{TORCH_LIBRARIES}}")
endif()
"""


def build_ops(folder: str | os.PathLike[str]) -> Path:
    """Build the ops as a C++ library for the CPU, for programs without Python.

    A program that links the library, or loads it by ``dlopen``, runs rewritten models that
    AOTInductor has packaged. In CMake, with ``folder`` in ``CMAKE_PREFIX_PATH``:

        find_package(mhf_compiler REQUIRED)
        target_link_libraries(program PRIVATE mhf_compiler::ops)

    Inductor's toolchain builds it, for the processor of this machine, as it does a package, and
    for this version of PyTorch. Where it runs it needs neither a compiler nor Python, but PyTorch's
    C++ libraries. It has the ops of inference, ``multi_head_ffn`` and ``router_product``, for the
    dtypes float32, float64, bfloat16 and float16.

    A Python process needs no such library, since importing the package defines the ops. One that
    loads it afterwards (``torch.ops.load_library``) keeps those.

    Args:
        folder: where to write ``lib/libmhf_compiler_ops.so`` and what CMake needs to find it. It
            is made if it does not exist; what it has of these files is replaced.

    Returns:
        The path of the library.

    Raises:
        OSError: the folder cannot be written.
        Exception: the compiler failed; the message has its output.
    """
    from mhf_compiler import compat

    lib = Path(folder) / "lib"
    config = lib / "cmake" / "mhf_compiler" / "mhf_compilerConfig.cmake"
    config.parent.mkdir(parents=True, exist_ok=True)
    library = lib / f"lib{_NAME}.so"
    with tempfile.TemporaryDirectory(dir=lib) as scratch:
        source = Path(scratch, f"{_NAME}.cpp")
        source.write_text(_source())
        # Replaced as a whole: a process may have the old one loaded.
        compat.build_cpp(source, Path(scratch, library.name)).replace(library)
    version = torch.__version__.partition("+")[0]
    config.write_text(_CONFIG.format(file=library.name, torch=version))
    return library


def _source() -> str:
    schemas = (
        f'constexpr const char* {constant} = R"({name}{registered[name]})";'
        for name, constant in _OPS.items()
    )
    constants = _CONSTANTS.format(
        schemas="\n".join(schemas),
        axes=", ".join(f'{{"{name}", "{letters}"}}' for name, letters in AXES.items()),
        activations=", ".join(f'"{name}"' for name in compiled.ACTIVATIONS),
        products=compiled.PRODUCTS_OF_THREAD,
    )
    return "\n".join((compiled.source(), constants, compiled.read("library.cpp")))
