"""What the ops do with CUDA tensors: which kernel runs, its buffers, and NCCL where there is no way to the peers.

Compiled and executed under emulation; not yet run on a GPU. The tests call these functions with CPU tensors, for which
the kernels run in Triton's interpreter or in the emulation of CUDA.
"""
