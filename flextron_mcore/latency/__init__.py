"""Latency: tables of what every candidate of every block costs on a device, measured or fitted."""
