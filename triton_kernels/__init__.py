"""Triton kernels: pointers and sizes, never a group. Installed as pypar.triton_kernels."""
