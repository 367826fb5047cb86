"""Benchmarks of the ops and models against others' code: installed as neox_kernels.bench, ``neox-kernels bench`` runs
them."""
