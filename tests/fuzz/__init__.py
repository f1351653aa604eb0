"""Random spellings of MH-FFNs, and programs that nearly are one.

spelling.py     the vocabulary: one tensor expression in many spellings
programs.py     the generator: a seed becomes the source of a module, and what must be found
mutations.py    a program becomes a near-miss
check.py        one program, compiled and compared with itself
runner.py       many of them, in parallel, and what they come to
__main__.py     the command line: ``make fuzz N=500 SEED=0``
gpu.py          random networks through all compilers, on a GPU: ``make fuzz-gpu N=500 SEED=0``
"""
