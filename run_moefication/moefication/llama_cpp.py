"""llama.cpp running a GGUF file, in a process of its own: it ends a process where it does not like a file.

    answer = ask(file, {"blocks": [[1, 2, 3]], "texts": ["a b"], "prompts": [[1, 2]], "new_tokens": 8})

The engine is that of the package xllamacpp. As a program, this module reads what is asked from standard input.
"""

import json
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from .errors import MoEficationError
from .progress import Progress

ENGINE = "xllamacpp"
MOST_BIAS = 1e9  # of a logit, so that this token comes next
# Lines that the process prints, after whatever the engine does: of each token that is predicted, and at last.
PREDICTED, START_OF_ANSWER = "PREDICTED\n", "ANSWER "


def is_installed() -> bool:
    """Whether there is an engine here."""
    return find_spec(ENGINE) is not None


def ask(file: Path, question: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    """Have the engine read a file and answer.

    Args:
        question: `blocks` of token ids to predict each next token of, `texts` to cut into tokens, `prompts` of token
            ids to go on from greedily for `new_tokens`, with `ignore_eos` beyond the end of a text; each may be left
            out.

    Returns: for each block `best`, the most likely token after each but the last, and `logprobs`, of the token that is
    there (None each where that is a part of a character); for each text `tokens`; for each prompt `greedy`, and
    `seconds`, that reading it and a new token took. MoEficationError if the engine does not run the file.
    """
    command = [sys.executable, "-m", __name__, str(file), str(threads)]
    answer, num_predicted = "", sum(len(ids) - 1 for ids in question.get("blocks", []))
    with TemporaryFile("w+") as asked, TemporaryFile("w+") as errors:
        json.dump(question, asked)
        asked.seek(0)
        bar = Progress(range(num_predicted), "llama.cpp reads the text", unit="token", leave=num_predicted > 0)
        with bar, subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=errors, text=True) as engine:
            for line in engine.stdout:
                bar.update(line == PREDICTED)
                answer = line.removeprefix(START_OF_ANSWER) if line.startswith(START_OF_ANSWER) else answer
        errors.seek(0)
        said = [line for line in errors if line.strip()] or [f"status {engine.returncode}"]
    if engine.returncode or not answer:
        reason = next((line for line in said if "rror" in line or "ASSERT" in line), said[-1])
        # Where its graph has no room for the experts that a token runs, it says no more than where it stopped.
        cure = "; convert with fewer and wider experts (RECIPE=engine)" if "ggml-impl.h" in reason else ""
        raise MoEficationError(f"llama.cpp does not run {file}: {reason.strip()}{cure}")
    return json.loads(answer)


class _Engine:
    """The engine with one file, in float32 but for the file's weights."""

    def __init__(self, file: str, threads: int, context: int):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = file, context, 1
        parameters.warmup, parameters.verbosity, parameters.n_gpu_layers = False, 1, 0
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for threading in (parameters.cpuparams, parameters.cpuparams_batch):
            threading.n_threads = threads
        self._server = xllamacpp.Server(parameters)

    def tokens(self, text: str) -> list[int]:
        data = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        url = f"{self._server.listening_address}/tokenize"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["tokens"]

    def complete(self, prompt: list[int], new_tokens: int, **more: Any) -> dict[str, Any]:
        options = {"n_predict": new_tokens, "temperature": 0, "n_probs": 1, "cache_prompt": True}
        answer = self._server.handle_completions({"prompt": prompt} | options | more)
        if "choices" not in answer:
            raise RuntimeError(f"error: {answer}")
        return answer

    def next(self, prompt: list[int], token: int) -> tuple[int | None, float | None]:
        """The most likely token after a prompt, and the log-probability of this one; None each where this one is a
        part of a character, of which the engine says nothing."""
        answer = self.complete(prompt, 1, logit_bias=[[token, MOST_BIAS]])
        if not (logprobs := answer["choices"][0]["logprobs"]):
            return None, None
        (content,) = logprobs["content"]
        return content["top_logprobs"][0]["id"], content["logprob"]


def main() -> int:
    """Answer the question of standard input; returns the exit status."""
    file, threads, question = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
    blocks, prompts, new_tokens = question.get("blocks", []), question.get("prompts", []), question.get("new_tokens", 0)
    longest = max((len(ids) + new_tokens for ids in blocks + prompts), default=0)
    engine = _Engine(file, threads, max(256, longest + 1))
    best, logprobs = [], []
    for block in blocks:
        rows = []
        for end in range(1, len(block)):
            rows.append(engine.next(block[:end], block[end]))
            print(f"\n{PREDICTED}", end="", flush=True)
        for column, values in zip((best, logprobs), zip(*rows, strict=True), strict=True):
            column.append(list(values))
    how = {"ignore_eos": question.get("ignore_eos", False)}
    answers = [engine.complete(prompt, new_tokens, **how) for prompt in prompts]
    timings = [answer["timings"] for answer in answers]
    answer = {
        "best": best,
        "logprobs": logprobs,
        "tokens": [engine.tokens(text) for text in question.get("texts", [])],
        "greedy": [[one["id"] for one in row["choices"][0]["logprobs"]["content"]] for row in answers],
        "seconds": [(row["prompt_ms"] / 1000, row["predicted_per_token_ms"] / 1000) for row in timings],
    }
    print(f"\n{START_OF_ANSWER}{json.dumps(answer)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
