"""Tiles other than the shipped ones, for users of max-autotune.

search.py  times them
store.py   what that found, in memory and on disk
"""
