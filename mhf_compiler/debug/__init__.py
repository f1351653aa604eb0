"""Tools to examine one graph or one site.

dump        graphs before and after as programs that run (option ``dump_dir``)
extract     one site as a program of its own
accuracy    the error of a rewritten program, and the largest that counts as rounding
"""
