"""The kernels for Hopper, in Gluon."""
