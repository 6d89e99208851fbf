"""Devices, memory, processes and files."""
