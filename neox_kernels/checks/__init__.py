"""Argument validation, once, above every backend.

Every error names the argument, what it was and what it must be, and comes before anything is touched. What can only be
known by reading values (positions) is checked by the backends.
"""
