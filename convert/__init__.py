"""Weights in, prefixes in and out: numpy and safetensors; torch only inside the functions that need it."""
