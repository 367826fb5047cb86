"""``python -m neox_kernels``: the command ``neox-kernels``."""

from neox_kernels.cli import main

if __name__ == "__main__":
    main()
