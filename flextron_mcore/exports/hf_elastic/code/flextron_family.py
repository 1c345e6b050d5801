"""Sub-networks of an elastic model: their space, their costs, and the network for a budget, read from flextron_family.json.

The network for every budget is in a table that `flextron export` wrote, so no solver is needed here.
"""

import json
import math
import re

FAMILY_FILE = "flextron_family.json"
FORMAT_VERSION = 2
# {unit of a budget: (cost, factor to the cost's own unit)}
UNITS = {"us": ("latency", 1e-3), "ms": ("latency", 1.0), "s": ("latency", 1e3)}
UNITS.update({name: ("parameters", size) for name, size in (("K", 1e3), ("M", 1e6), ("B", 1e9))})
UNITS.update({f"{name}iB": ("memory", 2.0**power) for name, power in (("K", 10), ("M", 20), ("G", 30), ("T", 40))})
UNITS.update({f"{name}B": ("memory", 10.0**power) for name, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12))})
OWN_UNITS = {"latency": "ms", "parameters": "parameters", "memory": "bytes"}
# A pair of calibration points is a step if their targets are within NARROW and their shares differ by more than STEP.
NARROW, STEP = 1 / 1024, 0.015
LAYER_KEYS = ("executed", "kv_groups", "query_heads_per_group", "ffn_hidden_size")


class Family:
    """Content of flextron_family.json. Methods raise ValueError, one line, for bad input."""

    def __init__(self, values):
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{FAMILY_FILE}: format {values.get('format')} is not known here: use the code in the same directory"
            )
        self.values = values
        self.model, self.space, self.costs = values["model"], values["space"], values["costs"]
        self.selector, self.adaptive = values["selector"], values["adaptive"]
        self.group_size = self.model["num_attention_heads"] // self.model["num_query_groups"]

    @classmethod
    def from_file(cls, file):
        """Read flextron_family.json."""
        with open(file, encoding="utf-8") as stream:
            return cls(json.load(stream))

    # Networks: {"hidden_size", "layers": [{"executed", "kv_groups", "query_heads_per_group", "ffn_hidden_size"}]}.

    def layer(self, heads, neurons):
        """Executed layer of a network, as in its JSON, with `heads` query heads in total and `neurons` neurons."""
        if self.space["attention_unit"] == "kv_group":
            groups, queries = heads // self.group_size, self.group_size
        else:
            groups, queries = self.model["num_query_groups"], heads // self.model["num_query_groups"]
        return dict(zip(LAYER_KEYS, (True, groups, queries, neurons), strict=True))

    def full(self):
        """Full model as a network, a dict as in a sub-network's JSON."""
        sizes = self.model["num_attention_heads"], self.model["ffn_hidden_size"]
        layers = [self.layer(*sizes) for _ in range(self.model["num_layers"])]
        return {"hidden_size": self.model["hidden_size"], "layers": layers}

    def network(self, index):
        """Network with the number `index` in the table of networks, a dict as in a sub-network's JSON.

        A layer that has no heads in the table is skipped.
        """
        row = self.values["networks"][index]
        skipped = dict(zip(LAYER_KEYS, (False, 0, 0, 0), strict=True))
        pairs = zip(row["heads"], row["ffn_hidden_size"], strict=True)
        layers = [self.layer(heads, neurons) if heads else dict(skipped) for heads, neurons in pairs]
        return {"hidden_size": row["hidden_size"], "layers": layers}

    def gains(self, network):
        """Modulation gains of a network, [attention, MLP] of each layer, which multiply the outputs; None without modulation."""
        if not self.values.get("modulation"):
            return None
        share = self.parameters(network) / self.parameters(self.full())
        return [[1 + (1 - share) * (first + second * share) for first, second in layer] for layer in self.values["modulation"]]

    def check(self, network, where="sub-network"):
        """Raise ValueError unless the space contains `network`. where: beginning of the message."""
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
                continue  # widths of a skipped layer do not matter
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
        """Cost of a network: "latency" in ms, "parameters", or "memory" in bytes."""
        layers = [layer for layer in network["layers"] if layer["executed"]]
        cost = self.costs[name]
        if network["hidden_size"] != self.model["hidden_size"]:
            cost = cost["narrow"][str(network["hidden_size"])]
        return cost["constant"] + sum(self._layer_cost(cost, layer) for layer in layers)

    def _layer_cost(self, cost, layer):
        """Cost of an executed layer. cost: table of a cost, with "heads" and "ffn_hidden_size" for each candidate."""
        space = self.space
        heads = space["heads"].index(layer["kv_groups"] * layer["query_heads_per_group"])
        return cost["heads"][heads] + cost["ffn_hidden_size"][space["ffn_hidden_size"].index(layer["ffn_hidden_size"])]

    def parameters(self, network):
        """Exact number of parameters of a network as a dense model."""
        return self.cost("parameters", network)

    def average(self, name, shares, kv_policy):
        """Average cost of token routing: constant, cost of the levels by their shares of tokens, and routing overhead.

        A level is the index of a block's candidate, 0 the smallest.

        Args:
            name: "latency" (ms), "parameters" or "memory" (bytes).
            shares: for each block (attention, then MLP, of each layer), the share of tokens at each of its levels.
            kv_policy: "full" (a token writes keys and values of all KV groups) or "own" (of the groups that it uses).
        """
        cost = self.costs[name]
        if name == self.adaptive["cost"]:
            cost = self.adaptive["token_costs"].get(kv_policy, cost)
        total = cost["constant"]
        for i, row in enumerate(shares):
            axis = ("heads", "ffn_hidden_size")[i % 2]
            row = row[: len(cost[axis])]  # without padding to the most levels of any block
            total += sum(share * value for share, value in zip(row, cost[axis], strict=True))
            if overhead := cost.get("overhead"):
                amounts = _overheads(row, self.space[axis], cost["tokens"])
                total += sum(amount * value for amount, value in zip(amounts, overhead[axis], strict=True))
        return total

    # Budgets.

    def parse(self, budget):
        """(name of the cost, limit in the cost's unit) of a budget: 0.6, "25ms", "3.4B", "8GiB", "0.6 parameters".

        A limit with a unit may be above the full model's cost, a fraction may not.
        """
        if isinstance(budget, (list, tuple)) or (isinstance(budget, str) and "," in budget):
            raise ValueError(f"budget={budget}: several budgets at once need a solver: use `flextron select`, and set_subnetwork")
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
            raise ValueError(f"budget={budget}: is of {name}, which this directory does not know: use one of {known}")
        cost = self.costs[name]
        limit = number * (cost["full"] if scale is None else scale)
        if scale is not None and self.exceeds(name, limit):
            return name, limit
        if not cost["smallest"] * (1 - 1e-9) <= limit <= cost["full"] * (1 + 1e-9):
            low, high, found = (show(name, value) for value in (cost["smallest"], cost["full"], limit))
            share = f"{cost['smallest'] / cost['full']:.3f} of the full model"
            raise ValueError(
                f"budget={budget}: {found} is not within {low} (the smallest network, {share}) and {high} (the full one)"
            )
        return name, limit

    def exceeds(self, name, limit):
        """True if the limit of a cost is above the full model's cost."""
        return limit > self.costs[name]["full"] * (1 + 1e-9)

    def untrained(self, name, limit):
        """(least, largest) share of the full model's cost that the routers were trained for, if a limit is outside; else None."""
        low, high = self.values["ranges"].get(name, (0.0, 1.0))
        return None if low - 1e-9 <= limit / self.costs[name]["full"] <= high + 1e-9 else (low, high)

    def answer(self, name, limit):
        """Number in the table of the network for a limit of a cost.

        It is the network of `flextron select`, or a network listed in the export's settings that uses more of the budget.
        """
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
            raise ValueError(
                f"budget: no network of selector {self.selector} keeps to {name} <= {show(name, limit)} ({share}): give a larger "
                "one"
            )
        return found

    def _best_bin(self, table, name, limit):
        """Number of the network with the best score in the cost bins just below the limit, as selection/router.py chooses.

        Without a network in these bins, the cheapest one.
        """
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
        """Target at which the adaptive routers spend `share` of the full model's cost on average, from their calibration.

        A target is 0 for the smallest network's cost, 1 for the full model's. ValueError outside of the calibrated range.
        """
        points = sorted(self.adaptive["calibration"])
        low, high = (pick(spent for _, spent in points) for pick in (min, max))
        if not low - 0.005 <= share <= high + 0.005:
            raise ValueError(
                f"budget: the adaptive routers spend {low:.3f} to {high:.3f} of the full model's cost, not {share:.3f}: give a "
                "budget in that range"
            )
        for (first, below), (second, above) in zip(points[:-1], points[1:], strict=True):
            if below < above and below <= share <= above:
                if second - first <= NARROW and above - below > STEP:  # a step: take its nearer end
                    return first if share - below < above - share else second
                return first + (second - first) * (share - below) / (above - below)
        return min(points, key=lambda point: abs(point[1] - share))[0]


def _overheads(row, sizes, tokens):
    """Expected amounts of the three routing overheads of a block, as in flextron_mcore/adaptive/usage.py.

    They are the probability that tokens have different levels; the number of levels that occur, minus 1; and the share of the
    block between a token's level and the highest level that occurs, a mean over tokens. row: share of tokens at each level.
    sizes: size of each level. tokens: number of tokens of a pass.
    """
    occurs = lambda share: 1 - (1 - share) ** tokens  # noqa: E731
    above, before = 0.0, 0
    for level, size in enumerate(sizes):
        above += (occurs(sum(row[level:])) * (size - before) - row[level] * size) / sizes[-1]
        before = size
    return 1 - sum(1 - occurs(1 - share) for share in row), sum(map(occurs, row)) - 1, above


def show(name, value):
    """Text of a cost with a unit, such as `3.4 B` parameters or `25 ms`."""
    if name == "latency":
        return f"{value:.4g} ms"
    units = ((1e9, "B"), (1e6, "M"), (1e3, "K")) if name == "parameters" else ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    for size, unit in units:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} {OWN_UNITS[name]}"
