"""Files of a checkpoint depend on what is saved, not on objects in memory."""

from __future__ import annotations

import pickle

from flextron_mcore.training.checkpointing import _interned


def test_equal_states_are_equal_bytes():
    """pickle writes a string object once. A loaded state has several equal ones, and would give other bytes than a new state."""
    made = {"optimizer": [{"max_lr": 1.0, "betas": (0.9, 0.95)}, {"max_lr": 2.0}], "scheduler": {"max_lr": 1.0}}
    loaded = {"optimizer": pickle.loads(pickle.dumps(made["optimizer"])), "scheduler": made["scheduler"]}
    assert pickle.dumps(made) != pickle.dumps(loaded)
    assert pickle.dumps(_interned(made)) == pickle.dumps(_interned(loaded))
    assert _interned(made) == made
