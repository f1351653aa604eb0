from support.compiler import fresh_compiler

__all__ = ["fresh_compiler"]
