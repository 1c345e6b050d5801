"""Settings: schemas of all stages, and how typed keys, recipes and defaults become settings. No torch import."""
