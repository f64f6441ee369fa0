"""Tests of the GPU kernels, and their oracle."""
