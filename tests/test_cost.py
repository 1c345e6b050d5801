"""Costs are exact sums over blocks; budgets are parsed from what a user types."""

from __future__ import annotations

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost, memory_cost, parameter_cost, parse_budget
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters, kv_cache_bytes, weight_bytes
from tests import toy

KINDS = {
    "llama": (dict(toy.LLAMA, share_embeddings_and_output_weights=True), 4, "kv_group"),
    "gqa": (toy.LLAMA, 2, "query_head"),
    "gpt2": (toy.GPT2, 4, "kv_group"),
}


def case(name: str):
    kind, groups, unit = KINDS[name]
    arch = toy.config(**kind, num_layers=3, num_query_groups=groups)
    return arch, ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])


@pytest.mark.parametrize("axes", [{}, {"hidden_size": [7, 16, 32], "depth": [1, 3]}])
@pytest.mark.parametrize("name", KINDS)
def test_sums_are_the_exact_counts(name, axes):
    arch, space = case(name)
    space = ElasticSpace.from_dict(arch, {**space.to_dict(), **axes})
    parameters, memory = parameter_cost(arch, space), memory_cost(arch, space, "bf16", 3, 100)
    for seed in range(20):
        net = toy.random_network(arch, space, seed)
        assert parameters.of(net) == count_parameters(arch, net)
        assert memory.of(net) == weight_bytes(arch, net, "bf16") + kv_cache_bytes(arch, net, 3, 100, "bf16")
    full = SubNetwork.full(arch)
    least = space.uniform(arch, space.heads[0], space.ffn_hidden_size[0], space.hidden_size[0], space.depth[0])
    for cost in (parameters, memory):
        assert (cost.full, cost.smallest) == (cost.of(full), cost.of(least))


def known() -> dict[str, Cost]:
    arch, space = case("llama")
    latency = Cost("latency", arch, space, 1.0, {"heads": (2.0, 3.0), "ffn_hidden_size": (1.0, 2.0, 3.0, 4.0)})  # 10 to 22 ms
    return {"latency": latency, "parameters": parameter_cost(arch, space), "memory": memory_cost(arch, space, "fp32", 1, 24)}


@pytest.mark.parametrize(
    "text, name, limit",
    [
        ("0.6", "latency", 13.2),
        (0.6, "latency", 13.2),
        (1, "latency", 22.0),
        ("15ms", "latency", 15.0),
        (" 0.015 s ", "latency", 15.0),
        ("12000us", "latency", 12.0),
        ("25K", "parameters", 25e3),
        ("0.025M", "parameters", 25e3),
        ("0.9 parameters", "parameters", None),
        ("100KiB", "memory", 102400.0),
        ("0.1MB", "memory", 100000.0),
        ("0.8memory", "memory", None),
    ],
)
def test_budgets_are_parsed_from_what_is_typed(text, name, limit):
    costs = known()
    (budget,) = parse_budget(text, costs)
    assert budget.cost is costs[name]
    assert budget.limit == pytest.approx(limit or float(text.strip("parmetsoy ")) * costs[name].full)


def test_several_budgets_hold_together():
    costs = known()
    for text in ("0.6,100KiB", ["0.6", "100KiB"], [0.6, "100KiB,"]):
        budgets = parse_budget(text, costs)
        assert [b.cost.name for b in budgets] == ["latency", "memory"]
    arch, space = case("llama")
    small = space.uniform(arch, 2, 12)
    assert all(budget.allows(small) for budget in budgets) and not budgets[0].allows(SubNetwork.full(arch))
    assert Budget(costs["latency"], costs["latency"].full).allows(SubNetwork.full(arch))


@pytest.mark.parametrize("text, cost", [("23ms", "latency"), ("7B", "parameters"), ("8GiB", "memory"), ("1e999ms", "latency")])
def test_an_absolute_budget_above_the_full_model_allows_it(text, cost):
    (budget,) = parse_budget(text, known())
    assert budget.cost.name == cost and budget.limit == budget.cost.full < budget.asked
    assert budget.allows(SubNetwork.full(case("llama")[0]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("fast", "is not a number with a unit, such as 0.6, 25ms, 3.4B or 8GiB"),
        ("1.2.3", "is not a number with a unit"),
        ("7 days", "the unit 'days' is not known: use one of latency, parameters, memory, us, ms"),
        ("0.1", r"2.2 ms is not within 10 ms \(the smallest network, 0.455 of the full model\) and 22 ms \(the full one\)"),
        ("1.1", "24.2 ms is not within"),
        ("nan", "is not within|is not a number"),
    ],
)
def test_bad_budgets_are_refused(text, message):
    with pytest.raises(FlextronError, match=message):
        parse_budget(text, known())
    with pytest.raises(FlextronError, match="budget=15ms: is of latency, which is not available here; available: parameters"):
        parse_budget("15ms", {"parameters": known()["parameters"]})
