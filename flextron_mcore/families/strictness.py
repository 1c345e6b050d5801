"""Check of config.json: keys that no family reads are refused, unless they cannot change the model's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flextron_mcore.config import FlextronError

# Keys without effect on the output: files, classes, generation, training tools. Not all of them come from transformers.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _experts_implementation_internal _flash_attn_2_enabled _model_name_or_path _name_or_path _num_labels _output_attentions
    _rope_scaling_validation architectures attn_implementation auto_map dtype experts_implementation finetuning_task
    gradient_checkpointing id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id max_sequence_length
    max_window_layers model_max_length model_type name_or_path neftune_noise_alpha num_labels output_attentions
    output_hidden_states output_router_logits output_scores prefix pretraining_tp problem_type return_dict
    return_dict_in_generate task_specific_params tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side torch_dtype torchscript transformers.js_config transformers_version
    trust_remote_code unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention use_flash_attn
    chunk_size_feed_forward

    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty mask_token_id max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences pad_token_id remove_invalid_values repetition_penalty sep_token_id suppress_tokens
    temperature top_k top_p typical_p unk_token_id
    """.split()
)

# {key that can change the model's output: its value without effect}. Null has none, either, but for is_causal,
# where transformers takes it for false.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_causal": True,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "mlp_bias": False,
    "no_bias": True,
    "num_experts": 0,
    "num_local_experts": 0,
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "qk_layernorm": False,
    "qkv_bias": False,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "rotary_pct": 1.0,
    "use_bias": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}

# {type of a value of config.json: words for a message}
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "true or false",
    list: "a list",
    dict: "an object in braces",
}


class ReadKeys(Mapping[str, Any]):
    """Read-only view of a config.json that records which of its keys were looked up.

    >>> config = ReadKeys({"hidden_size": 8, "sliding_window": 4})
    >>> config.get("hidden_size"), config.unread
    (8, ['sliding_window'])
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._read = config, set[str]()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    @property
    def unread(self) -> list[str]:
        """Keys that were not looked up, in the order of config.json."""
        return [key for key in self._config if key not in self._read]


def refuse_unread(config: ReadKeys, harmless: frozenset[str], architecture: str) -> None:
    """Raise FlextronError for a key that was not looked up, unless the key or its value cannot change the model's output.

    Args:
        config: config.json, after all keys of the family were read.
        harmless: keys without effect on the output in this family, beside HARMLESS.
        architecture: class of transformers, for the message.
    """
    changing = [key for key in config.unread if key not in HARMLESS | harmless and not _neutral(key, config[key])]
    if changing:
        named = ", ".join(f"{key}={shown(config[key])}" for key in changing[:5])
        raise FlextronError(
            f"{named} {'is' if len(changing) == 1 else 'are'} not supported: the import of a {architecture} does not read "
            f"{'this key' if len(changing) == 1 else 'these keys'}: remove from config.json only a key that does not change the "
            "model's output"
        )


def _neutral(key: str, value: Any) -> bool:
    """True if this value of a key of config.json cannot change the model's output."""
    if key == "layer_types":
        return isinstance(value, list) and set(map(str, value)) <= {"full_attention", "attention"}
    return (value is None and key != "is_causal") or (key in NEUTRAL and value == NEUTRAL[key])


def shown(value: Any) -> str:
    """Text of a value for a message: its repr, cut to at most 60 characters; null for None."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_ONCE = ("rope_theta", "partial_rotary_factor")  # allowed at the top level of config.json, too
_ROPE = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"}


def rope_parameters(
    config: Mapping[str, Any], known: Mapping[str, set[str]], renamed: Mapping[str, str]
) -> tuple[str, dict[str, Any], str]:
    """(name of the key, rotary parameters, type of scaling) from rope_scaling (transformers 4) or rope_parameters (5).

    Args:
        config: content of config.json.
        known: {type of scaling: names of its parameters}.
        renamed: {type of scaling: its present name}, for old names.

    Raises:
        FlextronError: rope_scaling and rope_parameters differ, a parameter differs from its copy at the top level of config.json,
            a parameter is unknown, or a value has the wrong type.
    """
    found = {name: config.get(name) for name in ("rope_scaling", "rope_parameters")}
    for name, rope in found.items():
        if rope is not None and not isinstance(rope, dict):
            raise FlextronError(f"{name} must be {KINDS[dict]}, not {shown(rope)}")
    named = {name: {k: v for k, v in rope.items() if v is not None} for name, rope in found.items() if rope}
    for key in _ONCE:
        values = {key: config.get(key), **{f"{name}.{key}": rope.get(key) for name, rope in named.items()}}
        _agree({name: value for name, value in values.items() if value is not None})
    scalings = {name: _scaling(rope) for name, rope in named.items()}
    _agree(scalings if len(named) > 1 else {})
    config.get("original_max_position_embeddings")  # marks the key as read; only some types of scaling use it
    name = next(iter(named), "rope_parameters")
    rope = {k: v for other in reversed(list(named.values())) for k, v in other.items()}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str):
        raise FlextronError(f"{name}.rope_type must be {KINDS[str]}, not {shown(kind)}")
    kind = renamed.get(kind, kind)
    if kind in known or kind == "default":
        unknown = sorted(rope.keys() - _ROPE - known.get(kind, set()))
        if unknown:
            raise FlextronError(
                f"{name} of type {kind} has the unknown key '{unknown[0]}', which may change the model's output: remove it only "
                "if it does not"
            )
    return name, rope, kind


def original_positions(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """Context length before rotary scaling: original_max_position_embeddings of `config`, else of the rotary parameters `rope`.

    Without either key, max_position_embeddings, else 2048, as in transformers. Raises FlextronError unless the value is a whole
    number of at least 1.
    """
    key = "original_max_position_embeddings"
    found = config.get(key) or rope.get(key) or config.get("max_position_embeddings") or 2048
    if isinstance(found, bool) or not isinstance(found, int | float) or found % 1 or found < 1:
        raise FlextronError(f"original_max_position_embeddings must be a whole number of at least 1, not {shown(found)}")
    return int(found)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scaling under the names of transformers 5, for comparison: without keys that may be at the top level."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return {"rope_type": kind, **{k: v for k, v in rope.items() if k not in ("rope_type", "type", *_ONCE)}}


def _agree(values: Mapping[str, Any]) -> None:
    """Raise FlextronError unless all values, {key of config.json: value}, are equal."""
    first = next(iter(values.items()), None)
    for name, value in values.items():
        if value != first[1]:
            raise FlextronError(
                f"{first[0]}={shown(first[1])} and {name}={shown(value)} disagree: leave one of them in config.json"
            )
