"""The public functions, one file per op family: docstring, checks, and the backend that serves the call."""
