"""Benchmarks of the ops and models against others' code: installed as neox_kernels.bench, run by ``neox-kernels bench``."""
