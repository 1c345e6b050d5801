"""Process groups, seeds, devices, and the CPU runtime."""
