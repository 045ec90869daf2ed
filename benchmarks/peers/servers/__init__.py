"""A server a file, written as its framework's own documentation does; each runs in that framework's environment.

What is served comes from the variables BENCHMARK_MODEL (a file of `benchmarks.models`) and BENCHMARK_THREADS.
"""
