"""Reading an exported directory back as its users do: in a separate process, with the code in the directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from flextron_mcore.config import FlextronError

# Environment variables of a launcher, removed for the process: with torchrun's it would wait for a rendezvous.
_LAUNCH = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


def read_logits(directory: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocabulary] in fp32 of tokens [B, S]. Raises FlextronError if Megatron-Core cannot load the directory."""
    with tempfile.TemporaryDirectory(prefix="flextron-read-") as folder:
        tokens, found = Path(folder, "tokens.pt"), Path(folder, "logits.pt")
        torch.save(tokens_BS, tokens)
        environment = {name: value for name, value in os.environ.items() if not _LAUNCH.fullmatch(name)}
        command = [sys.executable, "-m", "flextron_mcore.exports.megatron.read", str(directory), str(tokens), str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise FlextronError(
                f"{directory}: cannot be read back by Megatron-Core: {last}: do not use this export; please report it"
            )
        return torch.load(found)


def _main(directory: str, tokens: str, found: str) -> None:
    """Compute the logits of `tokens` with the code in `directory` and save them to `found`; the last two are files of tensors."""
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    from flextron_mcore.runtime import distributed

    distributed.initialize()
    sys.path.insert(0, directory)
    import load_model

    gpt = load_model.load(use_cpu_initialization=not torch.cuda.is_available(), perform_initialization=False).eval()
    with torch.no_grad():
        logits = load_model.logits(gpt.to(distributed.device()), torch.load(tokens).to(distributed.device()))
    torch.save(logits.float().cpu(), found)
    distributed.shutdown()


if __name__ == "__main__":
    _main(*sys.argv[1:])
