"""Thin model classes on top of the fused ops."""
