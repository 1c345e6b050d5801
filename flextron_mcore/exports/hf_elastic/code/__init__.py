"""Model code that is copied into exported elastic directories. Nothing in flextron_mcore imports it.

transformers (4.57 or newer) loads it from there with trust_remote_code=True (`auto_map` of config.json). It needs torch and
transformers only. So it repeats parts of the package (parameter counter, units and display of costs) and of the other family.
"""
