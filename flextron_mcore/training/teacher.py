"""Frozen teacher of a training: its checkpoint, opened and checked against the student and the data."""

from __future__ import annotations

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.model import check_layout
from flextron_mcore.settings.training import ElasticSettings, GumbelStageSettings, JointSettings


def open_teacher(
    settings: ElasticSettings | JointSettings | GumbelStageSettings, info: CheckpointInfo, data: PreparedData
) -> CheckpointInfo | None:
    """Open the checkpoint that settings.teacher names; None if the key is null.

    Raises FlextronError if the checkpoint is missing or damaged, if its vocabulary, tokenizer, positions or layout do not fit the
    training, or if distillation.weight is 0.

    Args:
        settings: settings of the stage.
        info: checkpoint that the training starts from.
        data: training data.
    """
    if settings.teacher is None:
        return None
    if settings.distillation.weight == 0:
        raise FlextronError("teacher: has no effect with distillation.weight=0: set distillation.weight, at most 1")
    teacher, key = open_checkpoint(settings.teacher, "teacher"), f"teacher={settings.teacher}"
    theirs, ours = teacher.model, info.model
    if theirs.vocab_size != ours.vocab_size:
        raise FlextronError(
            f"{key}: has a vocabulary of {theirs.vocab_size} tokens, the model one of {ours.vocab_size}: choose a teacher with "
            "the model's tokenizer, such as its parent"
        )
    vocabularies = read_vocabulary(data.tokenizer), teacher.tokenizer and read_vocabulary(teacher.tokenizer)
    if all(vocabularies) and (different := vocabularies[0].difference(vocabularies[1])):
        token, i = different
        raise FlextronError(
            f"{key}: has another tokenizer than data={data.path}: only one of the two has the token {i} {token[:40]!r}: choose a "
            "teacher with the model's tokenizer, such as its parent"
        )
    length = settings.model.seq_length or ours.default_length
    if length > theirs.max_position_embeddings:
        raise FlextronError(
            f"{key}: has {theirs.max_position_embeddings} positions, fewer than the {length} tokens of a sample: set "
            f"model.seq_length={theirs.max_position_embeddings} or less, or choose another teacher"
        )
    if settings.model.pipeline_model_parallel_size > 1 and theirs.hidden_size != ours.hidden_size:
        raise FlextronError(
            f"{key}: has hidden_size {theirs.hidden_size}, the model {ours.hidden_size}, and pipeline stages exchange one size "
            "only: set model.pipeline_model_parallel_size=1, or choose another teacher"
        )
    try:
        check_layout(theirs, teacher.space, settings.model, settings.trainer.precision)
    except FlextronError as error:
        raise FlextronError(f"{key}: does not fit the parallel layout: {error}") from None
    return teacher
