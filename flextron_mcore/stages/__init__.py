"""Commands, one file each: read typed settings, call the packages below, write results."""
