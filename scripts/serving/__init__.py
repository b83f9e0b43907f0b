"""Loads for a running service; used by benchmark_service.py and soak_service.py."""
