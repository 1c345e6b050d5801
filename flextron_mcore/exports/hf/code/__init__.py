"""Model code that is copied into exported directories. Nothing in flextron_mcore imports it.

transformers (4.57 or newer) loads it from there with trust_remote_code=True (`auto_map` of config.json). A directory gets the
files of one family only, so the files of the families repeat each other.
"""
