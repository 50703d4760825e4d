"""Contrast losses and their feature memory: GML, class-wise queues, fused CUDA kernels."""
