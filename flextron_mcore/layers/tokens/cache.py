"""KV cache of a block of heads with `kv_policy=own`, which keeps the participants' keys and values only.

Shape suffixes: B batch, n participants of a sequence, T keys, g KV groups of the block, H channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_mcore.layers.tokens.levels import Participants


@dataclass
class OwnCache:
    """KV cache of one block of heads with kv_policy=own: keys and values of the tokens that use these heads (participants).

    Memory grows in steps of ROOM tokens.

    Attributes:
        counts_B: number of cached tokens of each sequence.
        same: number of cached tokens if it is the same in all sequences, else None.
        keys, values: [room, B, g, H], with room for more tokens than are cached; None while the cache is empty.
    """

    counts_B: Tensor
    same: int | None = 0
    keys: Tensor | None = None
    values: Tensor | None = None

    ROOM = 32

    def append(self, participants: Participants, key_nBgH: Tensor, value_nBgH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append keys and values; return all keys, all values [T, B, g, H] and a mask [B, 1, n, T], True where a key is hidden.

        The mask is None where the causal mask suffices: with one sequence, or if all sequences are equally long in the cache and
        all new tokens are participants.

        Args:
            participants: new tokens that use the heads of this cache.
            key_nBgH, value_nBgH: keys and values of these tokens.
        """
        before_B, valid_nB = self.counts_B, participants.valid_nB
        if self.same is not None and (participants.rows is None or valid_nB.shape[1] == 1):
            start, self.same = self.same, self.same + len(valid_nB)
            self.counts_B = before_B + len(valid_nB)
            self._make_room(self.same, key_nBgH, value_nBgH)
            self.keys[start : self.same], self.values[start : self.same] = key_nBgH, value_nBgH
            return self.keys[: self.same], self.values[: self.same], None
        self.same = None
        self.counts_B = before_B + valid_nB.sum(0)
        needed = int(self.counts_B.max())
        self._make_room(needed, key_nBgH, value_nBgH)
        slots_nB = before_B + torch.arange(len(valid_nB), device=valid_nB.device)[:, None]
        where = slots_nB[valid_nB], valid_nB.nonzero()[:, 1]
        self.keys[where], self.values[where] = key_nBgH[valid_nB], value_nBgH[valid_nB]
        hidden = torch.arange(needed, device=valid_nB.device) > slots_nB.T[:, None, :, None]
        return self.keys[:needed], self.values[:needed], hidden

    def _make_room(self, needed: int, key: Tensor, value: Tensor) -> None:
        """Enlarge keys and values to room for `needed` tokens. key, value: tensors with the other dimensions and the dtype."""
        if self.keys is None or needed > len(self.keys):
            room = -(-needed // self.ROOM) * self.ROOM
            self.keys, self.values = (_grown(old, room, new) for old, new in ((self.keys, key), (self.values, value)))


def _grown(old: Tensor | None, room: int, like: Tensor) -> Tensor:
    """Tensor with `room` rows, which begins with the rows of `old`; other dimensions and dtype are those of `like`."""
    new = like.new_zeros(room, *like.shape[1:])
    if old is not None:
        new[: len(old)] = old
    return new
