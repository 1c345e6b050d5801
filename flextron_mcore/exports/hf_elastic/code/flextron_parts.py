"""Parts of elastic layers: current choice (one network, or token routing), tokens by level, keys and values of some KV groups.

Weights are never copied: products use views of them.

Shape suffixes: B batch, S tokens of this call, T tokens so far, N = B * S, n some of N, C hidden channels, G KV groups, Q query
heads of a group, H channels of a head, F neurons, K candidates, U hidden units of a router; small letters for the part in use.
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
    """Context in which the layers compute `choice`, in this thread: a Static, a TokenChoice, or None for the full model."""
    token = _ACTIVE.set(choice)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class Static:
    """One sub-network for all tokens. `layers` holds (KV groups, query heads of each, neurons), zeros for a skipped layer.

    Args:
        network: sub-network, as in its JSON.
        own: True if only keys and values of the KV groups in use are written.
        gains: [attention, MLP] that each layer's outputs are multiplied with; None: nothing.
    """

    def __init__(self, network, own, gains=None):
        self.network, self.own, self.hidden_size, self.gains = network, own, network["hidden_size"], gains
        names = ("kv_groups", "query_heads_per_group", "ffn_hidden_size")
        self.layers = [tuple(row[name] * bool(row["executed"]) for name in names) for row in network["layers"]]

    def executes(self, layer):
        """False for a skipped layer."""
        return bool(self.network["layers"][layer]["executed"])

    def heads(self, layer, x_BSC):
        """[(rows, number of KV groups, query heads of each group)] that a layer computes; rows: of the B*S tokens, None: all."""
        return [(None, *self.layers[layer][:2])]

    def neurons(self, layer, x_BSC):
        """[(rows, neurons)] that the layer computes for rows of the N tokens; rows None: all tokens."""
        return [(None, self.layers[layer][2])]


class TokenChoice:
    """Choice of a candidate of each block for every token, by the routers of flextron_mcore/adaptive/routers.py.

    Args:
        tensors: tensors of the routers, fp32.
        target: target of the routers, 0 (smallest network) to 1 (full model).
        heads_of: (KV groups, query heads of each group) of each level (index of a candidate, 0 the smallest).
        neurons_of: neurons of each level.
        own: True if a token writes only keys and values of the KV groups that it uses.
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
        self.counts_NK = torch.zeros(len(out_NKU), width, dtype=torch.float64)  # number of tokens that chose each candidate
        self.counted_BS = None  # mask of the tokens to count; None: all
        self._placed = {}

    def executes(self, layer):
        """True: token routing skips no layer."""
        return True

    def heads(self, layer, x_BSC):
        """[(rows, number of KV groups, query heads of each group)] that a layer computes; rows: of the B*S tokens, None: all."""
        return [(rows, *self.sizes[0][level]) for level, rows in self._by_level(2 * layer, x_BSC)]

    def neurons(self, layer, x_BSC):
        """[(rows, neurons)] that the layer computes for rows of the N tokens; rows None: all tokens."""
        return [(rows, self.sizes[1][level]) for level, rows in self._by_level(2 * layer + 1, x_BSC)]

    def levels(self, block, x_BSC):
        """Level that each token takes in a block, [B, S]: index of the candidate, 0 the smallest.

        Args:
            block: number of the block: 2 * layer for attention, 2 * layer + 1 for the MLP.
            x_BSC: input of the block, after the norm.
        """
        place = (block, x_BSC.device, x_BSC.dtype)
        if place not in self._placed:
            first = [tensor[block].to(x_BSC) for tensor in (self.tensors["token_NUD"], self.bias_NU)]
            self._placed[place] = first + [tensor[block].to(x_BSC.device) for tensor in (self.tensors["out_NKU"], self.bias_NK)]
        token_UC, bias_U, out_KU, bias_K = self._placed[place]
        units_BSU = F.linear(F.layer_norm(x_BSC, x_BSC.shape[-1:]), token_UC, bias_U)
        return F.linear(units_BSU.float().tanh(), out_KU, bias_K).argmax(-1)

    def _by_level(self, block, x_BSC):
        """[(level, rows)] of the levels that occur; rows None: all. Counts them in counts_NK. The host waits for the device."""
        levels_BS = self.levels(block, x_BSC)
        counted = levels_BS if self.counted_BS is None else levels_BS[self.counted_BS.to(levels_BS.device)]
        self.counts_NK[block] += torch.bincount(counted.flatten(), minlength=self.counts_NK.shape[1]).cpu()
        levels_N = levels_BS.flatten()
        present = levels_N.unique().tolist()
        return [(level, None if len(present) == 1 else (levels_N == level).nonzero()[:, 0]) for level in present]


class ElasticAttention:
    """Self-attention of a part of the heads, shared by both families.

    A family's class defines `extent`, (G, Q, H); `eager`, the attention function of its modeling file; queries(x_NC, g, q) ->
    [N, g, q, H]; keys(x_NC, g) and values(x_NC, g) -> [N, g, H]; projected(heads_NgqH, channels) -> [N, channels].
    """

    def attend(self, x_BSC, rotate, mask, cache, cache_kwargs, dropout, **kwargs):
        """(output [B, S, C], attention weights or None) of the current choice for hidden states [B, S, C].

        Keys and values of all KV groups are written into the cache, or with `own` those in use. A skipped layer does nothing else
        and returns its input.

        Args:
            x_BSC: input, after the norm.
            rotate: function that applies positions to (query, key), [B, heads, S, H] each.
            mask: attention mask of transformers.
            cache: KV cache, or None.
            cache_kwargs: further arguments of its update.
            dropout: probability of dropout on attention weights.
            kwargs: further arguments of the attention function.
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
            return x_BSC, None  # a skipped layer only writes the cache; its output is not used
        name, module = self.config._attn_implementation, self
        if q != Q:  # attention functions read num_key_value_groups of the module
            module = copy.copy(self)
            module.num_key_value_groups = q
        function = self.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        key, value = key[:, :g], value[:, :g]
        # Flash attention reads the window; other implementations have it in the mask. Some families have one in some layers.
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        options = {"dropout": dropout, "scaling": self.scaling, "sliding_window": window}
        heads, weights = function(module, query, key, value, mask, **options, **kwargs)
        heads = heads.reshape(len(x_NC), g, q, H)
        if parts[0][0] is None:
            return modulated(self.projected(self.compensated(heads), x_NC.shape[1]).view_as(x_BSC), self.layer_idx, 0), weights
        out_NC = torch.empty_like(x_NC)
        for rows, some_g, some_q in parts:
            out_NC[rows] = self.projected(self.compensated(heads[rows, :some_g, :some_q]), x_NC.shape[1])
        return out_NC.view_as(x_BSC), weights

    def compensated(self, heads_NgqH):
        """Part of each head's output that earlier heads of its KV group do not predict, if the model has a compensation."""
        matrix_GQQ = getattr(self, "compensation", None)
        if matrix_GQQ is None:
            return heads_NgqH
        g, q = heads_NgqH.shape[1:3]
        return torch.einsum("gqr,ngrh->ngqh", matrix_GQQ[:g, :q, :q].to(heads_NgqH), heads_NgqH)


def compensate(model, matrices):
    """Give the attention of each layer its compensation. matrices: [layers][G][Q][Q]; empty or None: none has one."""
    for module in model.modules() if matrices else ():
        if isinstance(module, ElasticAttention):
            module.register_buffer("compensation", torch.tensor(matrices[module.layer_idx]), persistent=False)


class ElasticLayer:
    """Decoder layer that may be skipped, shared by both families.

    A family's class defines `signature`, the inspect.Signature of the stock layer's forward; entry(), which returns (norm before
    attention, attention); and unchanged(x_BSC), the stock layer's return value for an output equal to its input.
    """

    def forward(self, *args, **kwargs):
        """Layer's output; a skipped layer returns its input, and writes the KV cache if the choice asks for it."""
        choice, (norm, attention) = _ACTIVE.get(), self.entry()
        if choice is None or choice.executes(attention.layer_idx):
            return super().forward(*args, **kwargs)
        given = self.signature.bind(self, *args, **kwargs).arguments
        x_BSC, cache = given["hidden_states"], given.get("cache", given.get("past_key_values"))  # transformers 5.24: cache
        if cache is not None and (not choice.own or has_counts(cache, attention.layer_idx)):
            named = {name: value for name, value in given.items() if name not in ("self", "hidden_states", "kwargs")}
            attention(norm(x_BSC), **named, **given.get("kwargs", {}))
        return self.unchanged(x_BSC)


def gathered(parts, x_NC, shape, compute):
    """Results of `compute(x_nC, *sizes)` for each (rows, *sizes) of `parts`, in one tensor [N, *shape], padded with zeros.

    Args:
        parts: [(rows, *sizes)], with disjoint indices of rows; or a single part with rows None, all rows, which is not padded.
        x_NC: input.
        shape: shape of a row of the result; its last dimension is that of every result, the others may be larger.
        compute: function (x_nC, *sizes) -> [n, ...].
    """
    if parts[0][0] is None:
        return compute(x_NC, *parts[0][1:])
    out = x_NC.new_zeros(len(x_NC), *shape)
    for rows, *sizes in parts:
        part = compute(x_NC[rows], *sizes)
        out[(rows, *map(slice, part.shape[1:-1]))] = part
    return out


def neurons_of_each(layer, x_BSC, full, compute):
    """Output of an MLP in the current choice, with the layer's gain: [B, S, C].

    Args:
        layer: index of the layer.
        x_BSC: input.
        full: neurons of the full MLP.
        compute: function (x_nC, neurons) -> output [n, C] of the first neurons.
    """
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
    """Output of a layer's attention (block 0) or MLP (block 1) times the gain of the current choice, if it has gains."""
    choice = _ACTIVE.get()
    return out_BSC * choice.gains[layer][block] if choice and choice.gains else out_BSC


# KV cache of some groups (kv_policy "own"). Keys get an additional first group, whose first channel is the number of groups at
# that position. A layer skipped from the start has no entries: at its first execution the earlier positions get a count of 0. The
# first layer always has entries, because transformers asks it for the number of positions.


def groups_written(written, count, device):
    """Number of KV groups whose keys and values each of the N tokens writes into the cache: [N].

    Args:
        written: [(rows, groups)]: number of groups for rows of the tokens; rows None: all.
        count: number of tokens, N.
        device: device of the result.
    """
    counts_N = torch.empty(count, dtype=torch.long, device=device)
    for rows, groups in written:
        counts_N[slice(None) if rows is None else rows] = groups
    return counts_N


def holds_own(cache, index):
    """True if a layer of the cache was written with kv_policy "own": it also holds the number of groups at each position."""
    if cache is None or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    return bool(layer.is_initialized and layer.keys.dim() == 4 and layer.keys.shape[1] == layer.values.shape[1] + 1)


def has_counts(cache, index):
    """True if a layer of the cache needs an entry for every position: the first layer, and layers that have entries already."""
    return index == 0 or (index < len(cache.layers) and cache.layers[index].is_initialized)


def unseen(cache, index, length):
    """Number of earlier positions that a layer of the cache lacks because it was skipped. length: tokens of this call."""
    if cache is None or index == 0 or type(cache.layers[0]) is not DynamicLayer or has_counts(cache, index):
        return 0
    return cache.layers[0].get_seq_length() - length  # the first layer already has the tokens of this call


def update_own(cache, index, key_BgSH, value_BgSH, counts_BS, cache_kwargs):
    """Add keys and values to the cache, and return all that it holds: keys and values [B, G, T, H], and counts [B, T].

    Keys and values are zero for groups that a token lacks. ValueError for a cache that is no DynamicCache.

    Args:
        cache: KV cache.
        index: index of the layer.
        key_BgSH: keys of this call.
        value_BgSH: values of this call.
        counts_BS: number of groups of each token of this call.
        cache_kwargs: further arguments of the cache's update.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and type(layer) is not DynamicLayer:
        raise ValueError('kv_policy="own" works with a DynamicCache only: leave past_key_values and cache_implementation out')
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
    """Attention mask that also hides positions without the group that a head reads; unchanged if none lacks one.

    Args:
        mask: mask of transformers: bool, additive, or None for causal.
        counts_BT: number of groups at each position.
        g: KV groups in use.
        q: query heads of each.
        query_BhSH: queries.
        implementation: attention implementation. If groups are missing, ValueError unless it is "eager" or "sdpa".
    """
    if not g or bool((counts_BT >= g).all()):
        return mask
    if implementation not in ("eager", "sdpa"):
        raise ValueError('kv_policy="own" needs attn_implementation "sdpa" or "eager" after the network was changed')
    length, total = query_BhSH.shape[2], counts_BT.shape[1]
    seen_BgT = counts_BT[:, None] > torch.arange(g, device=counts_BT.device)[:, None]
    seen_BhsT = seen_BgT.repeat_interleave(q, 1)[:, :, None]
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool, device=counts_BT.device).tril(total - length)[None, None]
    if mask.dtype == torch.bool:
        return mask & seen_BhsT
    return mask.masked_fill(~seen_BhsT, torch.finfo(mask.dtype).min)


# Modules that compute with the first channels, as many as their input or the current choice has.


class ElasticLinear(nn.Linear):
    """Linear layer that uses the first input channels."""

    def forward(self, x):
        """Output for an input with all or only the first channels: [..., c] -> [..., outputs]."""
        return F.linear(x, self.weight[:, : x.shape[-1]], self.bias)


class ElasticEmbedding(nn.Embedding):
    """Embedding that returns the first channels, as many as the current choice has."""

    def forward(self, ids):
        """Embeddings of token or position ids: [...] -> [..., c]."""
        choice = _ACTIVE.get()
        return F.embedding(ids, self.weight[:, : choice.hidden_size] if choice and choice.hidden_size else self.weight)


class ElasticLayerNorm(nn.LayerNorm):
    """LayerNorm over the first channels, as many as its input has."""

    shift = 0.0  # added to the weights: 1 for Nemotron's norm

    def forward(self, x):
        """Normalized input, [..., c] -> [..., c]."""
        size = x.shape[-1]
        return F.layer_norm(x, (size,), self.weight[:size] + self.shift, self.bias[:size], self.eps)


class ElasticRMSNorm(nn.Module):
    """RMSNorm over the first channels, as many as its input has."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        """Normalized input, [..., c] -> [..., c]."""
        x32 = x.float()
        return self.weight[: x.shape[-1]] * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def elastic_norm(norm):
    """Norm over the first channels, with the parameters of a stock one: an RMSNorm, a LayerNorm, or Nemotron's LayerNorm."""
    if not isinstance(norm, nn.LayerNorm):
        return ElasticRMSNorm(norm.weight, norm.variance_epsilon)
    found = ElasticLayerNorm(norm.normalized_shape, eps=norm.eps)
    found.weight, found.bias, found.shift = norm.weight, norm.bias, float(type(norm) is not nn.LayerNorm)
    return found
