"""``neox-kernels generate``: the text of a checkpoint's folder, as it comes and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_cases import talkers
from typer.testing import CliRunner

tokenizers = pytest.importorskip("tokenizers")

from neox_kernels import cli, text  # noqa: E402 - needs tokenizers

PROMPT = "What is it?"


def characters() -> Any:
    """A tokenizer of 96 tokens, one for each printable character of ASCII and one for the end of a line."""
    vocabulary = {"Ġ" if code == 32 else chr(code): code - 32 for code in range(32, 127)} | {"Ċ": 95}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


@pytest.fixture(params=["GPTNeoX", "GPTJ"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _, ours = talkers(request.param, vocab_size=96, eos_token_id=None)
    ours.save_pretrained(tmp_path)
    characters().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def expected(folder: Path, **settings: Any) -> str:
    """What ``generate`` gives, decoded at once."""
    model, tokenizer = text.load(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    return tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :].tolist())


def run(*words: object, stdin: str = "") -> Any:
    return CliRunner().invoke(cli._app(), ["generate", *map(str, words)], input=stdin, terminal_width=200)


def test_the_text_is_that_of_generate(folder: Path) -> None:
    free = expected(folder, max_new_tokens=30)
    assert len(set(free)) > 5, "the text says nothing"
    done = run(folder, PROMPT, "--max-new-tokens", 30)
    assert (done.exit_code, done.stdout) == (0, f"{PROMPT}{free}\n")
    facts = json.loads(run(folder, "-", "--max-new-tokens", 30, "--json", stdin=PROMPT).stdout)
    seconds = facts.pop("seconds")
    counts = {"prompt_tokens": len(PROMPT), "new_tokens": 30}
    assert facts == {"prompt": PROMPT, "text": free, **counts, "finish": "length"}
    assert all(seconds[name] > 0 for name in ("load", "first_token", "each_token"))
    beams = json.loads(run(folder, PROMPT, "--max-new-tokens", 9, "--num-beams", 3, "--json").stdout)
    assert beams["text"] == expected(folder, max_new_tokens=9, num_beams=3)


def test_drawn_text(folder: Path) -> None:
    words = folder, PROMPT, "--max-new-tokens", 20, "--temperature", 0.9, "--top-p", 0.95
    first, same, other = (run(*words, "--seed", seed).stdout for seed in (3, 3, 4))
    assert first == same != other
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "seed": 3, "max_new_tokens": 20}
    assert first == f"{PROMPT}{expected(folder, **settings)}\n"


def test_a_stop_text_is_never_shown(folder: Path) -> None:
    free = expected(folder, max_new_tokens=30)
    model, tokenizer = text.load(folder)
    for begin in (0, 7, 20):
        stop = free[begin : begin + 3]
        pieces: list[str] = []
        settings = {"max_new_tokens": 30}
        found = text.continuation(model, tokenizer, PROMPT, settings, ["not there", stop], pieces.append)
        assert found.text == "".join(pieces) == free[: free.index(stop)]
        assert found.finish == "stop" and found.new_tokens == free.index(stop) + 3
    pieces = []
    found = text.continuation(model, tokenizer, PROMPT, {"max_new_tokens": 30}, [free[-1] + "never"], pieces.append)
    assert "".join(pieces) == free and found.finish == "length", "what might have begun a stop text is shown in the end"
    done = run(folder, PROMPT, "--max-new-tokens", 30, "--stop", free[7:10])
    assert done.stdout == f"{PROMPT}{free[: free.index(free[7:10])]}\n"


def test_an_end_token_ends_it(folder: Path) -> None:
    free = expected(folder, max_new_tokens=30)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = ord(free[6]) - 32 if free[6] != "\n" else 95
    (folder / "config.json").write_text(json.dumps(config))
    facts = json.loads(run(folder, PROMPT, "--max-new-tokens", 30, "--json").stdout)
    assert facts["finish"] == "end" and facts["text"] == free[: free.index(free[6])]


def test_ctrl_c_keeps_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, tokens = expected(folder, max_new_tokens=5), text._tokens

    def interrupted(*args: Any) -> Iterator[int]:
        yield from tokens(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "_tokens", interrupted)
    done = run(folder, PROMPT, "--max-new-tokens", 5)
    assert (done.exit_code, done.stdout) == (130, f"{PROMPT}{free}\n")
    assert json.loads(run(folder, PROMPT, "--max-new-tokens", 5, "--json").stdout)["finish"] == "interrupted"


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        done = run(*words)
        assert done.exit_code not in (0, 130), done.output
        return str(done.output)

    assert "has no config.json" in said(tmp_path / "nowhere", PROMPT)
    assert "--device must be cpu or cuda, not tpu" in said(folder, PROMPT, "--device", "tpu")
    assert "--dtype must be one of float32" in said(folder, PROMPT, "--dtype", "float8")
    assert "at least one token" in said(folder, "")
    assert "at least one character" in said(folder, PROMPT, "--stop", "")
    assert "top_p must be above 0" in said(folder, PROMPT, "--top-p", 2)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["?"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json has token 500, and the model only 96" in said(folder, PROMPT)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer" in said(folder, PROMPT)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in said(folder, PROMPT)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    assert "must be one of gpt_neox, gptj, not 'llama'" in said(folder, PROMPT)
