"""Tools of layers that compute a part of themselves: the choice in use, tokens by level, keys and values of some groups.

Weights are never copied: every product is with a view of them.

Shape suffixes: B batch, S tokens at hand, T tokens so far, N = B * S, n some of N, C hidden channels, G KV groups, Q query heads
of a group, H channels of a head, F neurons, K candidates, U hidden units of a router; small letters for the part in use.
"""

import contextlib
import contextvars
import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ACTIVE = contextvars.ContextVar("flextron_active", default=None)


@contextlib.contextmanager
def computing(choice):
    """Inside the context (and in this thread) layers compute `choice`: a Static, a TokenChoice, or None for all of it."""
    token = _ACTIVE.set(choice)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class Static:
    """One sub-network for all tokens: `layers` holds (KV groups, query heads of each, neurons); zeros where one is skipped.

    gains: for each layer what the outputs of its attention and its MLP are multiplied with; None for nothing.
    """

    def __init__(self, network, own, gains=None):
        self.network, self.own, self.hidden_size, self.gains = network, own, network["hidden_size"], gains
        names = ("kv_groups", "query_heads_per_group", "ffn_hidden_size")
        self.layers = [tuple(row[name] * bool(row["executed"]) for name in names) for row in network["layers"]]

    def executes(self, layer):
        """True for a layer that is computed at all."""
        return bool(self.network["layers"][layer]["executed"])

    def heads(self, layer, x_BSC):
        """[(rows of the N tokens, KV groups, query heads of each)]; rows None: all."""
        return [(None, *self.layers[layer][:2])]

    def neurons(self, layer, x_BSC):
        """[(rows, neurons)]."""
        return [(None, self.layers[layer][2])]


class TokenChoice:
    """Every token chooses for itself, by routers of flextron_mcore/adaptive/routers.py.

    tensors: theirs, in fp32. target: between 0, the smallest network's cost, and 1. heads_of, neurons_of: sizes of each level.
    """

    # Equal to flextron_mcore/adaptive/routers.py: part of the static routers' log-probabilities that is kept, and its bound.
    KEPT, MOST = 0.25, 2.0
    gains = None

    def __init__(self, tensors, target, heads_of, neurons_of, own):
        self.own, self.hidden_size, self.tensors = own, None, tensors
        self.sizes = heads_of, neurons_of
        out_NKU, width = tensors["static.out_NKU"], tensors["out_NKU"].shape[1]
        target_C = torch.ones(tensors["target_NUC"].shape[-1])
        target_C[0] = target
        hidden_NU = torch.tanh(torch.einsum("c,nuc->nu", target_C, tensors["static.embed_NUC"]) + tensors["static.shift_NU"])
        logits_NK = torch.einsum("nu,nku->nk", hidden_NU, out_NKU) / hidden_NU.shape[-1] ** 0.5 + tensors["static.bias_NK"]
        counts_N = torch.tensor([len(self.sizes[i % 2]) for i in range(len(out_NKU))])
        missing_NK = torch.arange(width) >= counts_N[:, None]
        start_NK = (logits_NK.masked_fill(missing_NK, -torch.inf).log_softmax(-1) * self.KEPT).clamp_min(-self.MOST)
        self.bias_NK = tensors["bias_NK"] + start_NK.masked_fill(missing_NK, -torch.inf)
        self.bias_NU = tensors["target_NUC"] @ target_C
        self.counts_NK = torch.zeros(len(out_NKU), width, dtype=torch.float64)  # how many tokens chose what
        self.counted_BS = None  # which tokens are counted, None for all
        self._placed = {}

    def executes(self, layer):
        return True

    def heads(self, layer, x_BSC):
        return [(rows, *self.sizes[0][level]) for level, rows in self._by_level(2 * layer, x_BSC)]

    def neurons(self, layer, x_BSC):
        return [(rows, self.sizes[1][level]) for level, rows in self._by_level(2 * layer + 1, x_BSC)]

    def levels(self, block, x_BSC):
        """The candidate [B, S] that each token takes in a block, by what enters it."""
        place = (block, x_BSC.device, x_BSC.dtype)
        if place not in self._placed:
            first = [tensor[block].to(x_BSC) for tensor in (self.tensors["token_NUD"], self.bias_NU)]
            self._placed[place] = first + [tensor[block].to(x_BSC.device) for tensor in (self.tensors["out_NKU"], self.bias_NK)]
        token_UC, bias_U, out_KU, bias_K = self._placed[place]
        units_BSU = F.linear(F.layer_norm(x_BSC, x_BSC.shape[-1:]), token_UC, bias_U)
        return F.linear(units_BSU.float().tanh(), out_KU, bias_K).argmax(-1)

    def _by_level(self, block, x_BSC):
        """[(level, rows)]; waits for the device."""
        levels_BS = self.levels(block, x_BSC)
        counted = levels_BS if self.counted_BS is None else levels_BS[self.counted_BS.to(levels_BS.device)]
        self.counts_NK[block] += torch.bincount(counted.flatten(), minlength=self.counts_NK.shape[1]).cpu()
        levels_N = levels_BS.flatten()
        present = levels_N.unique().tolist()
        return [(level, None if len(present) == 1 else (levels_N == level).nonzero()[:, 0]) for level in present]


class ElasticAttention:
    """Self-attention of a part of the heads: what both families share.

    A family's class has `extent` (G, Q, H), `eager` (the attention function of its modelling file), queries(x_NC, g, q) -> [N, g,
    q, H], keys(x_NC, g) and values(x_NC, g) -> [N, g, H], and projected(heads_NgqH) -> [N, C].
    """

    def attend(self, x_BSC, rotate, mask, cache, cache_kwargs, dropout, **kwargs):
        """[B, S, C] -> ([B, S, C], attention weights or None). rotate: (query, key) [B, heads, S, H] -> the same with positions.

        Unless a choice has keys of its `own`, keys and values of all groups are written. In a skipped layer that is all.
        """
        choice, (G, Q, H) = _ACTIVE.get(), self.extent
        parts = choice.heads(self.layer_idx, x_BSC) if choice else [(None, G, Q)]
        g, q = (max(part[i] for part in parts) for i in (1, 2))
        batch, length, x_NC = *x_BSC.shape[:2], x_BSC.flatten(0, 1)
        written = [part[:2] for part in parts] if choice and choice.own else [(None, G)]
        shape = (max(count for _, count in written), H)
        key, value = (gathered(written, x_NC, shape, make) for make in (self.keys, self.values))
        query = gathered(parts, x_NC, (g, q, H), self.queries).flatten(1, 2)
        query, key, value = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        query, key = rotate(query, key)
        if (choice and choice.own) or holds_own(cache, self.layer_idx) or unseen(cache, self.layer_idx, length):
            counts_BS = groups_written(written, len(x_NC), x_BSC.device).view(batch, length)
            if cache is not None:
                key, value, counts_BS = update_own(cache, self.layer_idx, key, value, counts_BS, cache_kwargs)
            mask = hide_missing(mask, counts_BS, g, q, query, self.config._attn_implementation)
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx, cache_kwargs)
        if not g:
            return x_BSC, None  # what a skipped layer returns is looked at by nobody
        name, module = self.config._attn_implementation, self
        if q != Q:  # attention functions ask the module how many query heads share a key
            module = copy.copy(self)
            module.num_key_value_groups = q
        function = self.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        key, value = key[:, :g], value[:, :g]
        heads, weights = function(module, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        heads = heads.reshape(len(x_NC), g, q, H)
        if parts[0][0] is None:
            return modulated(self.projected(heads, x_NC.shape[1]).view_as(x_BSC), self.layer_idx, 0), weights
        out_NC = torch.empty_like(x_NC)
        for rows, some_g, some_q in parts:
            out_NC[rows] = self.projected(heads[rows, :some_g, :some_q], x_NC.shape[1])
        return out_NC.view_as(x_BSC), weights


class ElasticLayer:
    """A decoder layer that may be skipped: what both families share.

    A family's class has `signature`, that of the stock layer's forward, entry(): (the norm before its attention, its attention),
    and unchanged(x_BSC): what the stock layer would return for that.
    """

    def forward(self, *args, **kwargs):
        choice, (norm, attention) = _ACTIVE.get(), self.entry()
        if choice is None or choice.executes(attention.layer_idx):
            return super().forward(*args, **kwargs)
        given = self.signature.bind(self, *args, **kwargs).arguments
        x_BSC, cache = given["hidden_states"], given.get("past_key_values")
        if cache is not None and (not choice.own or has_counts(cache, attention.layer_idx)):
            named = {name: value for name, value in given.items() if name not in ("self", "hidden_states", "kwargs")}
            attention(norm(x_BSC), **named, **given.get("kwargs", {}))
        return self.unchanged(x_BSC)


def gathered(parts, x_NC, shape, compute):
    """[N, *shape]: for each (rows, sizes...) of `parts` what `compute(x_nC, *sizes)` gives, in the first places; else zeros."""
    if parts[0][0] is None:
        return compute(x_NC, *parts[0][1:])
    out = x_NC.new_zeros(len(x_NC), *shape)
    for rows, *sizes in parts:
        part = compute(x_NC[rows], *sizes)
        out[(rows, *map(slice, part.shape[1:-1]))] = part
    return out


def neurons_of_each(layer, x_BSC, full, compute):
    """An MLP: `compute(x_nC, neurons)` for the tokens of each width."""
    choice = _ACTIVE.get()
    parts = choice.neurons(layer, x_BSC) if choice else [(None, full)]
    if parts[0][0] is None:
        return modulated(compute(x_BSC, parts[0][1]), layer, 1)
    x_NC = x_BSC.flatten(0, 1)
    out_NC = torch.empty_like(x_NC)
    for rows, neurons in parts:
        out_NC[rows] = compute(x_NC[rows], neurons)
    return out_NC.view_as(x_BSC)


def modulated(out_BSC, layer, block):
    """The output of a layer's attention (block 0) or MLP (1), with the choice's gain."""
    choice = _ACTIVE.get()
    return out_BSC * choice.gains[layer][block] if choice and choice.gains else out_BSC


# Keys and values of some groups only (kv_policy "own"). A layer of the cache then holds one more "group" of keys, the first,
# whose first channel says how many groups a position has; so it is cropped, reordered and moved with the rest. A layer that was
# skipped from the start has nothing there: when it is executed first, the positions so far get a count of 0. Only the first layer
# counts always: transformers asks it how many positions there are.


def groups_written(written, count, device):
    """Number of groups [N] that each of the N tokens writes."""
    counts_N = torch.empty(count, dtype=torch.long, device=device)
    for rows, groups in written:
        counts_N[slice(None) if rows is None else rows] = groups
    return counts_N


def holds_own(cache, index):
    """True if a layer of the cache holds counts."""
    if cache is None or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    return bool(layer.is_initialized and layer.keys.dim() == 4 and layer.keys.shape[1] == layer.values.shape[1] + 1)


def has_counts(cache, index):
    """True if a layer that a network skips has to count its positions."""
    return index == 0 or (index < len(cache.layers) and cache.layers[index].is_initialized)


def unseen(cache, index, length):
    """Number of positions before the `length` at hand that a layer of the cache lacks, as it was skipped from the start."""
    if cache is None or index == 0 or type(cache.layers[0]) is not DynamicLayer or has_counts(cache, index):
        return 0
    return cache.layers[0].get_seq_length() - length  # the first layer has those at hand already


def update_own(cache, index, key_BgSH, value_BgSH, counts_BS, cache_kwargs):
    """Add keys and values to the cache: all keys and values [B, G, T, H], zeros where there are none, and the counts [B, T]."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and type(layer) is not DynamicLayer:
        raise ValueError('kv_policy="own" wants a DynamicCache, the default')
    started = layer is not None and layer.is_initialized and layer.keys.dim() == 4
    if started and not holds_own(cache, index):  # until now all groups were written
        layer.keys = _counted(layer.keys, layer.keys.shape[1])
    held = layer.values.shape[1] if started else 0
    if held < value_BgSH.shape[1] and started:
        more = value_BgSH.shape[1] - held
        layer.keys, layer.values = _with_groups(layer.keys, more), _with_groups(layer.values, more)
    missing = max(held - value_BgSH.shape[1], 0)
    key_BgSH = _with_groups(_counted(key_BgSH, counts_BS), missing)
    value_BgSH = _with_groups(value_BgSH, missing)
    if before := unseen(cache, index, len(counts_BS[0])):
        key_BgSH, value_BgSH = (F.pad(x, (0, 0, before, 0)) for x in (key_BgSH, value_BgSH))
    keys, values = cache.update(key_BgSH, value_BgSH, index, cache_kwargs)
    return keys[:, 1:], values, keys[:, 0, :, 0]


def _counted(key_BGSH, counts):
    row = key_BGSH.new_zeros(len(key_BGSH), 1, *key_BGSH.shape[2:])
    row[:, 0, :, 0] = counts
    return torch.cat([row, key_BGSH], 1)


def _with_groups(x_BGSH, more):
    return F.pad(x_BGSH, (0, 0, 0, 0, 0, more)) if more else x_BGSH


def hide_missing(mask, counts_BT, g, q, query_BhSH, implementation):
    """`mask` with what positions lack hidden: the same mask where the first `g` groups of all are there."""
    if not g or bool((counts_BT >= g).all()):
        return mask
    if implementation not in ("eager", "sdpa"):
        raise ValueError('kv_policy="own" wants attn_implementation "sdpa" or "eager" where networks were switched')
    length, total = query_BhSH.shape[2], counts_BT.shape[1]
    seen_BgT = counts_BT[:, None] > torch.arange(g, device=counts_BT.device)[:, None]
    seen_BhsT = seen_BgT.repeat_interleave(q, 1)[:, :, None]
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool, device=counts_BT.device).tril(total - length)[None, None]
    if mask.dtype == torch.bool:
        return mask & seen_BhsT
    return mask.masked_fill(~seen_BhsT, torch.finfo(mask.dtype).min)


# Modules that compute with the first channels only, as many as come in or are wanted.


class ElasticLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight[:, : x.shape[-1]], self.bias)


class ElasticEmbedding(nn.Embedding):
    def forward(self, ids):
        choice = _ACTIVE.get()
        return F.embedding(ids, self.weight[:, : choice.hidden_size] if choice and choice.hidden_size else self.weight)


class ElasticLayerNorm(nn.LayerNorm):
    def forward(self, x):
        size = x.shape[-1]
        return F.layer_norm(x, (size,), self.weight[:size], self.bias[:size], self.eps)
