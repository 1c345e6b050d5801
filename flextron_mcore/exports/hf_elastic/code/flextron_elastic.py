"""An elastic causal language model: one copy of the weights, and every sub-network of it by budget, at run time."""

import contextlib
import copy
import shutil
import time
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, logging

from .flextron_family import FAMILY_FILE, Family
from .flextron_parts import Static, TokenChoice, computing

logger = logging.get_logger(__name__)

ROUTERS_FILE = "flextron_routers.safetensors"
KV_POLICIES = ("full", "own")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class ElasticForCausalLM:
    """Methods that a family's class of transformers gains. Bad input raises ValueError with one line.

    kv_policy of a choice: with "full", every network writes keys and values of all KV groups (also of layers that it skips), and
    one that is switched to later finds them all. With "own", a network writes those that it uses only, and layers that it skips
    are not executed: less work and a smaller cache; positions that lack a group which is used later are not seen by it.
    """

    family = None  # what flextron_family.json holds
    _choice = None  # what is computed: a Static, a TokenChoice, or None for the full model
    _budget = None
    _calls = None  # if a list, gets the number of tokens of each forward pass
    _drafts = False  # whether this handle drafts, for a sequence without padding

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does, and read the directory's sub-networks."""
        hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.family_file = cached_file(pretrained_model_name_or_path, FAMILY_FILE, **hub)
        model.family, model._made, model.routers = Family.from_file(model.family_file), {}, None
        if model.family.adaptive:
            model.routers_file = cached_file(pretrained_model_name_or_path, ROUTERS_FILE, **hub)
            model.routers = load_state_dict(model.routers_file)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does: the full model, and the files of its sub-networks."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.family is not None:
            shutil.copyfile(self.family_file, Path(save_directory) / FAMILY_FILE)
            if self.routers is not None:
                shutil.copyfile(self.routers_file, Path(save_directory) / ROUTERS_FILE)

    def _known(self):
        if self.family is None:
            raise ValueError("this model was not loaded from an exported directory: it knows of no sub-networks")
        return self.family

    # The choice in use.

    def set_budget(self, budget, adaptive=False, kv_policy=None):
        """Compute, from now on, the network that `flextron select` takes for a budget.

        budget: 0.6 (of the full model), "25ms", "3.4B", "8GiB"; None: the full model. adaptive: every token chooses for itself,
        and the budget is kept on average; for directories with adaptive routers. kv_policy: "full", or "own"; default: the
        adaptive routers' own, else "full".
        """
        family = self._known()
        if budget is None:
            if adaptive:
                raise ValueError("budget=None is the full model, which leaves tokens nothing to choose")
            self._choice = self._static(None, "full", kv_policy)
        elif adaptive:
            self._choice = self._token_choice(budget, kv_policy)
        else:
            name, limit = family.parse(budget)
            if outside := family.untrained(name, limit):
                logger.warning_once(
                    f"budget={budget} is outside of what the routers were trained for, {outside[0]:.3g} to {outside[1]:.3g}"
                )
            index = family.answer(name, limit)
            self._choice = self._static(family.network, index, kv_policy)
        self._budget = budget

    def set_subnetwork(self, network, kv_policy=None):
        """Compute a given network of the space, from now on: a dict as in a sub-network's JSON; None: the full model."""
        family = self._known()
        if network is not None:
            family.check(network)
            network = copy.deepcopy(dict(network))
        network = network or family.full()
        self._choice = Static(network, self._own(kv_policy), family.gains(network))
        self._budget = None

    def at(self, budget=None, network=None, **options):
        """Another handle on the same weights with a choice of its own: as `set_budget`, or given a `network` as `set_subnetwork`.

        It costs no memory to speak of. Both may be used at a time, each with its own cache.
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
        """The budget that was set, as it was given; None for none."""
        return self._budget

    @property
    def adaptive(self):
        """True if tokens choose for themselves."""
        return isinstance(self._choice, TokenChoice)

    @property
    def subnetwork(self):
        """The network that is computed, as plain types; None where tokens choose for themselves."""
        if self.adaptive:
            return None
        return copy.deepcopy(self._choice.network) if self._choice else self._known().full()

    def costs(self):
        """Costs of the choice in use: "parameters", "bytes" of these, "memory" with the KV cache of budgets, "latency" in ms.

        "share": of each the share of the full model's. Where tokens choose for themselves, their average since the budget was
        set (the full model's before any).
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
        policy = kv_policy or default
        if policy not in KV_POLICIES:
            raise ValueError(f"kv_policy={policy!r} is not known: use one of {', '.join(KV_POLICIES)}")
        space = self.family.space
        return policy == "own" and (space["attention_unit"] == "kv_group" or len(space["depth"]) > 1)

    def _static(self, read, index, kv_policy):
        """A tabulated network, or the full one, made when it is first wanted."""
        own, family = self._own(kv_policy), self.family
        if (index, own) not in self._made:
            network = family.full() if read is None else read(index)
            self._made[index, own] = Static(network, own, family.gains(network))
        return self._made[index, own]

    def _token_choice(self, budget, kv_policy):
        family = self.family
        if family.adaptive is None:
            raise ValueError("adaptive=True: this directory has no adaptive routers")
        name, limit = family.parse(budget)
        if name != (first := family.adaptive["cost"]):
            raise ValueError(f"budget={budget}: the adaptive routers serve a budget of {first}")
        target = family.target(limit / family.costs[name]["full"])
        space = family.space
        heads = [tuple(family.layer(size, 0).values())[1:3] for size in space["heads"]]
        own = self._own(kv_policy, family.adaptive["kv_policy"])
        return TokenChoice(self.routers, target, heads, space["ffn_hidden_size"], own)

    @contextlib.contextmanager
    def chosen(self, args, kwargs):
        """Inside the context layers compute this handle's choice."""
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
        """Generate with a small network of the same weights that drafts, and this one that verifies: a SpeculativeOutput.

        input_ids: [1, S]. draft_budget: as for `set_budget`, or a network as for `set_subnetwork`. draft_length: tokens drafted
        before they are verified together. The draft keeps a cache of its own. kwargs: of `generate`; do_sample defaults to False.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(f"generate_speculative: decodes one sequence, not {input_ids.shape[0]}")
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
        # Of what a pass verifies, one token comes from the pass before (in the first one, the prompt does).
        drafted = sum(verifier._calls) - input_ids.shape[1] - (len(verifier._calls) - 1)
        accepted = sequences.shape[1] - input_ids.shape[1] - len(verifier._calls)
        return SpeculativeOutput(sequences, drafted, max(accepted, 0), len(verifier._calls), seconds, input_ids.shape[1])

    def _prepare_attention_mask_for_generation(self, inputs_tensor, *args, **kwargs):
        # transformers 5 loses a mask of ones before it asks the draft, which then takes tokens with the padding's id for padding.
        if self._drafts:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, *args, **kwargs)


class SpeculativeOutput:
    """sequences [1, T]; tokens drafted and accepted; passes of the verifying network; seconds; prompt: tokens before."""

    def __init__(self, sequences, drafted, accepted, passes, seconds, prompt):
        self.sequences, self.drafted, self.accepted, self.passes = sequences, drafted, accepted, passes
        self.seconds, self.new_tokens = seconds, sequences.shape[1] - prompt

    @property
    def acceptance_rate(self):
        """The share of drafted tokens that the verifying network would have written too."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self):
        return self.new_tokens / self.seconds

    def __repr__(self):
        return (
            f"SpeculativeOutput(new_tokens={self.new_tokens}, passes={self.passes}, acceptance_rate={self.acceptance_rate:.3f}, "
            f"tokens_per_second={self.tokens_per_second:.1f})"
        )
