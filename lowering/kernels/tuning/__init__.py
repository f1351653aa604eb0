"""Tiles other than the shipped ones, for whoever asks for tuned kernels.

search.py  times them
store.py   what that found, in memory and on disk
"""
