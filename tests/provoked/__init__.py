"""Record of the refusals that a run of the tests provokes.

`FLEXTRON_MESSAGES=FILE make test` makes it, and `python -m tests.messages FILE` lists the refusals that are not in it.
tests/conftest.py puts this folder on the PYTHONPATH of the processes that tests start; Python imports sitecustomize.py from it.
"""
