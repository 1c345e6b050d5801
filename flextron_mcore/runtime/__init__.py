"""Process groups, devices, seeds, the CPU runtime, disk, locks, signals, and the watch over ranks."""
