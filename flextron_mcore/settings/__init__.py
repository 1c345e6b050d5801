"""Settings: schemas of all stages, and their composition from defaults, recipes and typed keys. No torch import."""
