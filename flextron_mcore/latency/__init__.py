"""Latency tables: milliseconds of every candidate of every block on a device, measured or fitted."""
