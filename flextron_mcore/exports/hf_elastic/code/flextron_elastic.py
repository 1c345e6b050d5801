"""Elastic causal language model: one copy of the weights, of which every sub-network can be chosen at run time."""

import contextlib
import copy
import shutil
import time
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, logging

from .flextron_family import FAMILY_FILE, Family
from .flextron_parts import Static, TokenChoice, compensate, computing

logger = logging.get_logger(__name__)

ROUTERS_FILE = "flextron_routers.safetensors"
KV_POLICIES = ("full", "own")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class ElasticForCausalLM:
    """Methods of an elastic model, added to a family's class of transformers. They raise ValueError, one line, for bad input.

    A `kv_policy` says which keys and values a network writes into the KV cache. "full": of all KV groups, also in skipped layers,
    so that any network can continue the text. "own": of the KV groups that the network uses; skipped layers write none. This
    saves time and memory, but a network set later does not see positions that lack one of its groups.
    """

    family = None  # content of flextron_family.json, a Family
    _choice = None  # Static, TokenChoice, or None for the full model
    _budget = None
    _calls = None  # list that gets the number of tokens of each forward pass, or None
    _drafts = False  # True for a handle that drafts in generate_speculative

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load an exported directory as transformers does, with its tables of sub-networks and its routers, if it has any."""
        hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.family_file = cached_file(pretrained_model_name_or_path, FAMILY_FILE, **hub)
        model.family, model._made, model.routers = Family.from_file(model.family_file), {}, None
        compensate(model, model.family.values.get("compensation"))
        if model.family.adaptive:
            model.routers_file = cached_file(pretrained_model_name_or_path, ROUTERS_FILE, **hub)
            model.routers = load_state_dict(model.routers_file)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the full model as transformers does, whatever network is set, and the tables of sub-networks and routers.

        The directory can be loaded again with `from_pretrained`.

        Args:
            save_directory: directory to write to.
            args, kwargs: further arguments of transformers' save_pretrained.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.family is not None:
            shutil.copyfile(self.family_file, Path(save_directory) / FAMILY_FILE)
            if self.routers is not None:
                shutil.copyfile(self.routers_file, Path(save_directory) / ROUTERS_FILE)

    def _known(self):
        """Family of sub-networks of the exported directory. ValueError for a model that was not loaded from one."""
        if self.family is None:
            raise ValueError(
                "this model was not loaded from an exported directory, so it has no sub-networks: use from_pretrained"
            )
        return self.family

    # Choice of the network.

    def set_budget(self, budget, adaptive=False, kv_policy=None):
        """Set the network for a budget; later calls compute it.

        It is the network that `flextron select` chooses, or one listed in the export's settings that uses more of the budget.
        Without `adaptive`, a budget with a unit that exceeds the full model's cost gives the full model, with a warning. Raises
        ValueError for a budget that cannot be read or met, and with `adaptive` also for one of another cost than the routers'.

        Args:
            budget: 0.6 (share of the full model's cost, see README.md of the directory), "25ms", "3.4B" (parameters), "8GiB"
                (memory); None: the full model.
            adaptive: True lets routers choose for every token, so that the average cost meets the budget; needs adaptive routers.
            kv_policy: "full" or "own", see the class; None: with adaptive the policy of the routers' training, else "full".
        """
        family = self._known()
        if budget is None:
            if adaptive:
                raise ValueError(
                    "budget=None is the full model, in which routers choose nothing: give a budget, or adaptive=False"
                )
            self._choice = self._static(None, "full", kv_policy)
        elif adaptive:
            self._choice = self._token_choice(budget, kv_policy)
        else:
            name, limit = family.parse(budget)
            if family.exceeds(name, limit):
                logger.warning_once(f"budget={budget} allows the full model, whose {name} is less")
                self._choice, self._budget = self._static(None, "full", kv_policy), budget
                return
            if outside := family.untrained(name, limit):
                logger.warning_once(
                    f"budget={budget} is outside of the range that the routers were trained for, {outside[0]:.3g} to "
                    f"{outside[1]:.3g} of the full model"
                )
            index = family.answer(name, limit)
            self._choice = self._static(family.network, index, kv_policy)
        self._budget = budget

    def set_subnetwork(self, network, kv_policy=None):
        """Set a sub-network; later calls compute it.

        Args:
            network: dict as in a sub-network's JSON (`flextron select out=FILE` writes one); None: the full model.
            kv_policy: "full" or "own", see the class; None: "full".
        """
        family = self._known()
        if network is not None:
            family.check(network)
            network = copy.deepcopy(dict(network))
        network = network or family.full()
        self._choice = Static(network, self._own(kv_policy), family.gains(network))
        self._budget = None

    def at(self, budget=None, network=None, **options):
        """Second handle on the same weights, with its own network. Both can be used in turn, each with its own KV cache.

        Args:
            budget: budget, such as 0.6 or "25ms" (see `set_budget`); None: the full model.
            network: sub-network as a dict (see `set_subnetwork`), instead of a budget.
            options: further arguments of `set_budget` or `set_subnetwork`.
        """
        view = copy.copy(self)
        view.generation_config = copy.deepcopy(self.generation_config)
        if network is not None:
            view.set_subnetwork(network, **options)
        else:
            view.set_budget(budget, **options)
        return view

    @property
    def budget(self):
        """Budget of the last `set_budget`, as it was given; None for the full model, or after `set_subnetwork`."""
        return self._budget

    @property
    def adaptive(self):
        """True if routers choose for every token."""
        return isinstance(self._choice, TokenChoice)

    @property
    def subnetwork(self):
        """Current sub-network as a dict that `set_subnetwork` takes; None if routers choose for every token."""
        if self.adaptive:
            return None
        return copy.deepcopy(self._choice.network) if self._choice else self._known().full()

    def costs(self):
        """Costs of the current network.

        If routers choose for every token, costs are averages over the tokens since the budget was set, padding left out; before
        the first token they are the full model's costs.

        Returns:
            {"parameters", "bytes" (of the parameters), "memory" (bytes with the KV cache that budgets count), "latency" (ms, if
            the directory has a latency table), "share": {cost: share of the full model's cost}}.
        """
        family, dtype = self._known(), self.dtype
        if self.adaptive:
            counts_NK = self._choice.counts_NK
            if not counts_NK.sum():
                found = {name: family.costs[name]["full"] for name in family.costs}
            else:
                shares = (counts_NK / counts_NK.sum(-1, keepdim=True)).tolist()
                policy = "own" if self._choice.own else "full"
                found = {name: family.average(name, shares, policy) for name in family.costs}
        else:
            network = self._choice.network if self._choice else family.full()
            found = {name: family.cost(name, network) for name in family.costs}
        share = {name: value / family.costs[name]["full"] for name, value in found.items()}
        return {**found, "bytes": found["parameters"] * _BYTES.get(dtype, dtype.itemsize), "share": share}

    def _own(self, kv_policy, default="full"):
        """True: keys and values of the KV groups in use are written; False: of all groups. ValueError for an unknown policy.

        False also where every network uses all groups: query heads are the unit, and depth is not elastic.

        Args:
            kv_policy: "full", "own", or None for `default`.
            default: policy for None.
        """
        policy = kv_policy or default
        if policy not in KV_POLICIES:
            raise ValueError(f"kv_policy={policy!r} is not known: use one of {', '.join(KV_POLICIES)}")
        space = self.family.space
        return policy == "own" and (space["attention_unit"] == "kv_group" or len(space["depth"]) > 1)

    def _static(self, read, index, kv_policy):
        """Static choice that makes the layers compute one network; built once, then reused.

        Args:
            read: function that returns the network for `index`; None for the full model.
            index: number of the network in the table; "full" for the full model.
            kv_policy: "full" or "own"; None for "full".
        """
        own, family = self._own(kv_policy), self.family
        if (index, own) not in self._made:
            network = family.full() if read is None else read(index)
            self._made[index, own] = Static(network, own, family.gains(network))
        return self._made[index, own]

    def _token_choice(self, budget, kv_policy):
        """Routing by the adaptive routers, set so that the average cost of a token is the budget, by their calibration.

        ValueError without adaptive routers, and for a budget of another cost or outside of the routers' calibration.

        Args:
            budget: 0.6 (share of the full model's cost), "25ms", "3.4B" (parameters) or "8GiB" (memory).
            kv_policy: "full" or "own", see the class; None: the policy of the routers' training.
        """
        family = self.family
        if family.adaptive is None:
            raise ValueError("adaptive=True: this directory has no adaptive routers: use adaptive=False")
        name, limit = family.parse(budget)
        if name != (first := family.adaptive["cost"]):
            raise ValueError(f"budget={budget}: the adaptive routers were trained for budgets of {first}: give one of that cost")
        target = family.target(min(limit / family.costs[name]["full"], 1.0))
        space = family.space
        heads = [tuple(family.layer(size, 0).values())[1:3] for size in space["heads"]]
        own = self._own(kv_policy, family.adaptive["kv_policy"])
        return TokenChoice(self.routers, target, heads, space["ffn_hidden_size"], own)

    @contextlib.contextmanager
    def chosen(self, args, kwargs):
        """Context in which layers compute this handle's network. args, kwargs: arguments of the model's forward, unchanged."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if self._calls is not None and tokens is not None:
            self._calls.append(tokens.shape[1])
        if self.adaptive:
            mask = kwargs.get("attention_mask")
            padded = mask is not None and mask.dim() == 2 and tokens is not None
            self._choice.counted_BS = mask[:, -tokens.shape[1] :].bool() if padded else None
        with computing(self._choice):
            yield

    # Self-speculative decoding.

    def generate_speculative(self, input_ids, draft_budget=0.5, draft_length=4, max_new_tokens=64, **kwargs):
        """Generate by speculative decoding: a small sub-network drafts tokens, the current network verifies them together.

        Args:
            input_ids: prompt, [1, S]; ValueError for several sequences.
            draft_budget: budget (see `set_budget`) or dict (see `set_subnetwork`) of the network that drafts.
            draft_length: tokens drafted before they are verified.
            max_new_tokens: most tokens to generate.
            kwargs: further arguments of `generate`; do_sample is False by default.

        Returns:
            A SpeculativeOutput.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"generate_speculative: decodes one sequence, not {input_ids.shape[0]}: pass input_ids of shape [1, S]"
            )
        draft = self.at(network=draft_budget) if isinstance(draft_budget, dict) else self.at(draft_budget)
        draft._drafts, settings = True, draft.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = draft_length, "constant"
        settings.assistant_confidence_threshold = 0.0
        verifier = copy.copy(self)
        verifier._calls = []
        options = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "max_new_tokens": max_new_tokens, **kwargs}
        begun = time.perf_counter()
        out = verifier.generate(input_ids, assistant_model=draft, **options)
        seconds = time.perf_counter() - begun
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        # Each pass also reads one token of the pass before; the first pass reads the prompt.
        drafted = sum(verifier._calls) - input_ids.shape[1] - (len(verifier._calls) - 1)
        accepted = sequences.shape[1] - input_ids.shape[1] - len(verifier._calls)
        return SpeculativeOutput(sequences, drafted, max(accepted, 0), len(verifier._calls), seconds, input_ids.shape[1])

    def _prepare_attention_mask_for_generation(self, inputs_tensor, *args, **kwargs):
        # transformers 5 drops a mask of ones before it calls the draft, which then takes tokens with the padding id for padding.
        if self._drafts:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, *args, **kwargs)


class SpeculativeOutput:
    """Result of `generate_speculative`.

    sequences: token ids with the prompt, [1, T]. drafted: number of drafted tokens. accepted: number of drafted tokens that were
    kept. passes: forward passes of the verifying network. seconds: time of the whole generation. new_tokens: number of tokens
    after the prompt.
    """

    def __init__(self, sequences, drafted, accepted, passes, seconds, prompt):
        self.sequences, self.drafted, self.accepted, self.passes = sequences, drafted, accepted, passes
        self.seconds, self.new_tokens = seconds, sequences.shape[1] - prompt

    @property
    def acceptance_rate(self):
        """Share of drafted tokens that the verifying network kept; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self):
        """Generated tokens a second."""
        return self.new_tokens / self.seconds

    def __repr__(self):
        return (
            f"SpeculativeOutput(new_tokens={self.new_tokens}, passes={self.passes}, acceptance_rate={self.acceptance_rate:.3f}, "
            f"tokens_per_second={self.tokens_per_second:.1f})"
        )
