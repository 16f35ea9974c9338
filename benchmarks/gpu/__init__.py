"""The measurements of `bench_gpu.py`: a module for each group of them, and what they share."""
