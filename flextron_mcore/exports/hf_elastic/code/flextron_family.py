"""The sub-networks of an elastic model: the space they are from, their costs, and which one answers a budget.

All of it comes from flextron_family.json. No solver is here: `flextron export` tabulated the answers to every budget.
"""

import json
import math
import re

FAMILY_FILE = "flextron_family.json"
FORMAT_VERSION = 2
# unit as a user writes it: cost, and how many of the cost's own unit it is
UNITS = {"us": ("latency", 1e-3), "ms": ("latency", 1.0), "s": ("latency", 1e3)}
UNITS.update({name: ("parameters", size) for name, size in (("K", 1e3), ("M", 1e6), ("B", 1e9))})
UNITS.update({f"{name}iB": ("memory", 2.0**power) for name, power in (("K", 10), ("M", 20), ("G", 30), ("T", 40))})
UNITS.update({f"{name}B": ("memory", 10.0**power) for name, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12))})
OWN_UNITS = {"latency": "ms", "parameters": "parameters", "memory": "bytes"}
# Of a calibration's points: how near targets may come to each other, and by how much then the share still changes at a step.
NARROW, STEP = 1 / 1024, 0.015
LAYER_KEYS = ("executed", "kv_groups", "query_heads_per_group", "ffn_hidden_size")


class Family:
    """The contents of flextron_family.json, `values`. Bad input raises ValueError with one line."""

    def __init__(self, values):
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"{FAMILY_FILE}: format {values.get('format')} is not known here: use the code beside it")
        self.values = values
        self.model, self.space, self.costs = values["model"], values["space"], values["costs"]
        self.selector, self.adaptive = values["selector"], values["adaptive"]
        self.group_size = self.model["num_attention_heads"] // self.model["num_query_groups"]

    @classmethod
    def from_file(cls, file):
        with open(file, encoding="utf-8") as stream:
            return cls(json.load(stream))

    # Networks: {"hidden_size", "layers": [{"executed", "kv_groups", "query_heads_per_group", "ffn_hidden_size"}]}.

    def layer(self, heads, neurons):
        """One layer of a network, by its query heads in total and its neurons."""
        if self.space["attention_unit"] == "kv_group":
            groups, queries = heads // self.group_size, self.group_size
        else:
            groups, queries = self.model["num_query_groups"], heads // self.model["num_query_groups"]
        return dict(zip(LAYER_KEYS, (True, groups, queries, neurons), strict=True))

    def full(self):
        """The whole model."""
        sizes = self.model["num_attention_heads"], self.model["ffn_hidden_size"]
        layers = [self.layer(*sizes) for _ in range(self.model["num_layers"])]
        return {"hidden_size": self.model["hidden_size"], "layers": layers}

    def network(self, index):
        """One of the tabulated networks; a layer without heads is skipped."""
        row = self.values["networks"][index]
        skipped = dict(zip(LAYER_KEYS, (False, 0, 0, 0), strict=True))
        pairs = zip(row["heads"], row["ffn_hidden_size"], strict=True)
        layers = [self.layer(heads, neurons) if heads else dict(skipped) for heads, neurons in pairs]
        return {"hidden_size": row["hidden_size"], "layers": layers}

    def gains(self, network):
        """Gains of each layer's attention and MLP outputs; None for a model without modulation."""
        if not self.values.get("modulation"):
            return None
        share = self.parameters(network) / self.parameters(self.full())
        return [[1 + (1 - share) * (first + second * share) for first, second in layer] for layer in self.values["modulation"]]

    def check(self, network, where="sub-network"):
        """Raise ValueError unless `network` is a member of the space."""
        model, space = self.model, self.space
        try:
            hidden, layers = network["hidden_size"], [tuple(layer[key] for key in LAYER_KEYS) for layer in network["layers"]]
            extra = [key for layer in network["layers"] for key in layer if key not in LAYER_KEYS]
        except (TypeError, KeyError, IndexError):
            extra = ["?"]
        if extra:
            raise ValueError(f"{where}: expected {{'hidden_size', 'layers': [{{{', '.join(LAYER_KEYS)}}}]}}")
        if len(layers) != model["num_layers"]:
            raise ValueError(f"{where}: has {len(layers)} layers, the model has {model['num_layers']}")
        if hidden not in space["hidden_size"]:
            raise ValueError(f"{where}: hidden_size {hidden} is not a candidate {space['hidden_size']} of this space")
        executed = sum(bool(layer[0]) for layer in layers)
        if executed not in space["depth"]:
            raise ValueError(f"{where}: {executed} executed layers are not a candidate {space['depth']} of this space")
        allowed = [tuple(self.layer(heads, 0).values())[1:3] for heads in space["heads"]]
        for i, (runs, groups, queries, neurons) in enumerate(layers):
            if not runs:
                continue  # it has no widths
            if neurons not in space["ffn_hidden_size"]:
                raise ValueError(
                    f"{where}: layers[{i}].ffn_hidden_size {neurons} is not a candidate {space['ffn_hidden_size']} of this space"
                )
            if (groups, queries) not in allowed:
                pairs = ", ".join(f"{g} x {q}" for g, q in allowed)
                raise ValueError(
                    f"{where}: layers[{i}] has {groups} KV groups x {queries} query heads, not a candidate ({pairs})"
                )

    # Costs.

    def cost(self, name, network):
        """Cost of a network, in the cost's own unit."""
        layers = [layer for layer in network["layers"] if layer["executed"]]
        if name == "parameters":
            return self.parameters(network)
        if name == "memory":
            memory = self.values["memory"]
            numbers = sum(layer["kv_groups"] for layer in layers) * 2 * self.model["kv_channels"]
            numbers *= memory["batch_size"] * memory["length"]
            return (self.parameters(network) + numbers) * memory["bytes_a_number"]
        cost = self.costs[name]
        if network["hidden_size"] != self.model["hidden_size"]:
            cost = cost["narrow"][str(network["hidden_size"])]
        return cost["constant"] + sum(self._layer_cost(cost, layer) for layer in layers)

    def _layer_cost(self, cost, layer):
        space = self.space
        heads = space["heads"].index(layer["kv_groups"] * layer["query_heads_per_group"])
        return cost["heads"][heads] + cost["ffn_hidden_size"][space["ffn_hidden_size"].index(layer["ffn_hidden_size"])]

    def parameters(self, network):
        """Exact number of parameters of a network cut out of the model."""
        model, hidden, size = self.model, network["hidden_size"], self.model["kv_channels"]
        norm = hidden if model["normalization"] == "rmsnorm" else 2 * hidden
        gated = 2 if model["activation"] in ("swiglu", "geglu") else 1
        total = norm
        for layer in network["layers"]:
            if not layer["executed"]:
                continue
            keys = layer["kv_groups"] * size
            queries, neurons = keys * layer["query_heads_per_group"], layer["ffn_hidden_size"]
            total += hidden * (2 * queries + 2 * keys + gated * neurons + neurons) + 2 * norm
            if model["bias"]:
                total += queries + 2 * keys + gated * neurons + 2 * hidden
        total += model["vocab_size"] * hidden * (1 if model["share_embeddings_and_output_weights"] else 2)
        if model["position_embedding_type"] == "learned_absolute":
            total += model["max_position_embeddings"] * hidden
        return total

    def average(self, name, shares, kv_policy):
        """Average cost of tokens that choose for themselves; shares: for each block, of tokens at each of its levels.

        As TokenCost of flextron_mcore/adaptive/usage.py, with the routing overhead where it was measured.
        """
        cost = self.costs[name]
        if name == self.adaptive["cost"]:
            cost = self.adaptive["token_costs"].get(kv_policy, cost)
        total = cost["constant"]
        for i, row in enumerate(shares):
            axis = ("heads", "ffn_hidden_size")[i % 2]
            row = row[: len(cost[axis])]  # rows are padded
            total += sum(share * value for share, value in zip(row, cost[axis], strict=True))
            if overhead := cost.get("overhead"):
                amounts = _overheads(row, self.space[axis], cost["tokens"])
                total += sum(amount * value for amount, value in zip(amounts, overhead[axis], strict=True))
        return total

    # Budgets.

    def parse(self, budget):
        """(cost, limit in its own unit) of a budget as `flextron select` takes it: 0.6, "25ms", "3.4B", "0.6 parameters"."""
        if isinstance(budget, (list, tuple)) or (isinstance(budget, str) and "," in budget):
            raise ValueError(f"budget={budget}: several budgets at once want a solver: use `flextron select`, and set_subnetwork")
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", str(budget))
        try:
            number, unit = float(match[1]), match[2]
        except (TypeError, ValueError):
            raise ValueError(
                f"budget={budget}: is not a number with a unit, such as 0.6, 25ms, 3.4B or 8GiB, nor None for the full model"
            ) from None
        if unit and unit not in UNITS and unit not in OWN_UNITS:
            raise ValueError(f"budget={budget}: the unit '{unit}' is not known: use one of {', '.join([*OWN_UNITS, *UNITS])}")
        name, scale = UNITS.get(unit, (unit or self.values["fraction_of"], None))
        if name not in self.costs:
            known = ", ".join(self.costs)
            raise ValueError(f"budget={budget}: is of {name}, which this directory does not know; known: {known}")
        cost = self.costs[name]
        limit = number * (cost["full"] if scale is None else scale)
        if not cost["smallest"] * (1 - 1e-9) <= limit <= cost["full"] * (1 + 1e-9):
            low, high, found = (show(name, value) for value in (cost["smallest"], cost["full"], limit))
            share = f"{cost['smallest'] / cost['full']:.3f} of the full model"
            raise ValueError(
                f"budget={budget}: {found} is not within {low} (the smallest network, {share}) and {high} (the full one)"
            )
        return name, limit

    def untrained(self, name, limit):
        """The range of shares that the routers were trained for, if a budget is outside of it."""
        low, high = self.values["ranges"].get(name, (0.0, 1.0))
        return None if low - 1e-9 <= limit / self.costs[name]["full"] <= high + 1e-9 else (low, high)

    def answer(self, name, limit):
        """The index of the network for a budget: the one that `flextron select` takes, unless a given one uses more of it."""
        table, most = self.values["answers"][name], limit * (1 + 1e-12)
        if "cells" in table:  # cost bins
            found = self._best_bin(table, name, most)
        else:
            found = ([index for least, index in table["steps"] if least <= most] or [None])[-1]
        used = 0.0 if found is None else self.cost(name, self.network(found))
        given = [(value, index) for value, index in table["given"] if used <= value <= most]
        if given:
            return max(given)[1]
        if found is None:
            share = f"{limit / self.costs[name]['full']:.3f} of the full model"
            raise ValueError(f"budget: no network of selector {self.selector} keeps to {name} <= {show(name, limit)} ({share})")
        return found

    def _best_bin(self, table, name, limit):
        """The best scored network of the cost bins just below the limit: [score, cost, network] (selection/router.py)."""
        bins, cost, width, within = table["cells"], self.costs[name], self.values["cell"], self.values["within"]
        full, smallest = cost["full"], cost["smallest"]
        top = min(max(math.floor((limit - smallest) / (width * full)), 0), len(bins) - 1)
        inside = []
        for number in range(top, -1, -1):
            high = min(smallest + (number + 1) * (width * full), full)
            if high < limit - within * full and inside:
                break
            if bins[number] and bins[number][1] <= limit:
                inside.append(bins[number])
                if inside[-1][1] < limit - within * full and len(inside) == 1:
                    break
        near = [found for found in inside if found[1] >= limit - within * full]
        best = max(near or inside, key=lambda found: found[:2], default=None)
        return best[2] if best else table["least"][0]

    def target(self, share):
        """The target at which the adaptive routers spend `share` of the full model's cost on average, by their calibration."""
        points = sorted(self.adaptive["calibration"])
        low, high = (pick(spent for _, spent in points) for pick in (min, max))
        if not low - 0.005 <= share <= high + 0.005:
            raise ValueError(f"budget: the adaptive routers spend {low:.3f} to {high:.3f} of the full model's, not {share:.3f}")
        for (first, below), (second, above) in zip(points[:-1], points[1:], strict=True):
            if below < above and below <= share <= above:
                if second - first <= NARROW and above - below > STEP:  # a step: its nearer end
                    return first if share - below < above - share else second
                return first + (second - first) * (share - below) / (above - below)
        return min(points, key=lambda point: abs(point[1] - share))[0]


def _overheads(row, sizes, tokens):
    """Amounts of routing overhead of a block, as in flextron_mcore/adaptive/usage.py. row: share of tokens at each level."""
    occurs = lambda share: 1 - (1 - share) ** tokens  # noqa: E731
    above, before = 0.0, 0
    for level, size in enumerate(sizes):
        above += (occurs(sum(row[level:])) * (size - before) - row[level] * size) / sizes[-1]
        before = size
    return 1 - sum(1 - occurs(1 - share) for share in row), sum(map(occurs, row)) - 1, above


def show(name, value):
    """A cost for people."""
    if name == "latency":
        return f"{value:.4g} ms"
    units = ((1e9, "B"), (1e6, "M"), (1e3, "K")) if name == "parameters" else ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    for size, unit in units:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} {OWN_UNITS[name]}"
