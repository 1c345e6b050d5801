"""Code that travels inside exported directories (`auto_map`). It needs torch and transformers only, 4.57 or newer, and is loaded
from there with trust_remote_code=True; nothing in flextron_mcore imports it. What it repeats of the package (the parameter
counter, units of budgets and how costs are shown), of exports/hf/code and of the other family is therefore meant."""
