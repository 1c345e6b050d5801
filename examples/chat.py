"""Chat with an elastic model, and change its size between messages. DIR is the out of `flextron export format=hf_elastic`.

    python examples/chat.py DIR [--budget 0.6] [--tokens 200] [--temperature 0.7]

The model continues each line that you type; if the tokenizer has a chat template, the line is a message. Commands:
/budget 0.5 (or 25ms, 3.4B, 8GiB, full), /adaptive (routers choose for every token, at the same budget), /reset (forget the text),
/help, /quit. The KV cache is kept when the size changes. Needs torch and transformers only.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

COMMANDS = "/budget 0.5, /adaptive, /reset, /help, /quit"


class Chat:
    """Conversation so far, as text or messages, with its KV cache."""

    def __init__(self, model, tokenizer, tokens: int, temperature: float) -> None:
        self.model, self.tokenizer, self.tokens, self.temperature = model, tokenizer, tokens, temperature
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and the cache."""
        self.ids: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.cache = DynamicCache()

    @torch.no_grad()
    def say(self, text: str) -> None:
        """Continue the conversation with `text`: print up to `tokens` generated tokens as they come, then speed and cost.

        Forgets the conversation so far if it does not fit into the model's positions. Ctrl-C ends the answer.
        """
        room = getattr(self.model.config, "max_position_embeddings", 2**31) - self.tokens
        self.ids = self.encode(text)
        if len(self.ids) > room and self.cache.get_seq_length():
            print("[the text is too long for the model: it is forgotten]")
            self.reset()
            self.ids = self.encode(text)
        self.ids = self.ids[-max(room, 1) :]
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True)
        begun, written = time.perf_counter(), []
        try:
            for _ in range(self.tokens):
                written.append(self.next_token())
                self.ids.append(written[-1])
                if written[-1] == self.tokenizer.eos_token_id:
                    break
                streamer.put(torch.tensor(written[-1:]))
        except KeyboardInterrupt:
            pass
        streamer.end()
        seconds = time.perf_counter() - begun
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(written, skip_special_tokens=True)})
        print(f"[{len(written)} tokens, {len(written) / seconds:.1f} tokens/s, {self.state()}]", flush=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of the conversation followed by `text`. Drops cached keys and values from the first differing token on."""
        if self.tokenizer.chat_template:
            self.messages.append({"role": "user", "content": text})
            rendered = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(rendered, add_special_tokens=False).input_ids
        else:
            ids = self.ids + self.tokenizer(text, add_special_tokens=not self.ids).input_ids
        known = min(self.cache.get_seq_length(), len(ids) - 1)
        same = next((i for i in range(known) if ids[i] != self.ids[i]), known)
        if same < self.cache.get_seq_length():
            self.cache.crop(same - self.cache.get_seq_length())
        return ids

    def next_token(self) -> int:
        """Id of the next token, from a forward pass over the tokens that are not in the KV cache yet."""
        new = torch.tensor([self.ids[self.cache.get_seq_length() :]], device=self.model.device)
        logits = self.model(input_ids=new, past_key_values=self.cache, use_cache=True).logits[0, -1].float()
        if not self.temperature:
            return int(logits.argmax())
        return int(torch.multinomial((logits / self.temperature).softmax(-1), 1))

    def state(self) -> str:
        """Words for the budget, and for the network's costs as shares of the full model's."""
        costs = self.model.costs()
        shares = ", ".join(f"{share:.1%} of {name}" for name, share in costs["share"].items())
        budget = "full model" if self.model.budget is None else f"budget {self.model.budget}"
        return f"{budget}{', token routing' if self.model.adaptive else ''}: {shares}"

    def command(self, line: str) -> None:
        """Execute a line that begins with /, and print budget and costs. Raises ValueError for a wrong command or budget."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        if name == "budget" and value:
            self.model.set_budget(None if value in ("full", "none") else value)
        elif name == "adaptive":
            budget = value or self.model.budget
            if budget is None:
                raise ValueError("/adaptive needs a budget: type /adaptive 0.6, or /budget 0.6 before it")
            self.model.set_budget(budget, adaptive=True)
        elif name == "reset":
            self.reset()
        else:
            raise ValueError(f"commands: {COMMANDS}")
        print(f"[{self.state()}]", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"commands: {COMMANDS}")
    parser.add_argument("directory", help="out of `flextron export format=hf_elastic`")
    parser.add_argument("--budget", help="0.6, 25ms, 3.4B, 8GiB; default: the full model")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens generated for each line")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(given.directory, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(given.directory, trust_remote_code=True).eval().to(device)
        if not hasattr(model, "set_budget"):
            raise ValueError(f"{given.directory}: is not the out of `flextron export format=hf_elastic`: name one")
        chat = Chat(model, tokenizer, given.tokens, given.temperature)
        model.set_budget(given.budget)
    except (OSError, ValueError) as error:
        print(f"chat: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"[{chat.state()}; {COMMANDS}]", flush=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").rstrip("\n")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip() in ("/quit", "/exit"):
            return 0
        try:
            if line.startswith("/"):
                chat.command(line)
            elif line:
                chat.say(line)
        except ValueError as error:
            print(f"[{error}]", flush=True)


if __name__ == "__main__":
    sys.exit(main())
