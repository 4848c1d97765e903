"""Speed: models take turns, what warms up doesn't count, and exactly as many tokens are written as are asked for."""

from __future__ import annotations

import math

import pytest
import torch

from hesso_hf.cli import speed
from tests.support.tiny import tiny_llama


def test_models_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, done = [0.0], []

    def working(name: str, *seconds: float) -> None:
        done.append(name)
        clock[0] += seconds[done.count(name) - 1]

    monkeypatch.setattr(speed, "timer", lambda: clock[0])
    works = [lambda: working("a", 90.0, 1.0, 5.0, 2.0), lambda: working("b", 80.0, 4.0, 3.0, 9.0)]
    assert speed.median_seconds(works, repeats=3) == [2.0, 4.0]
    assert done == ["a", "b"] * 4


@pytest.mark.parametrize("count", [1, 5])
def test_as_many_tokens_are_written_as_are_asked_for_whatever_ends_a_text(count: int) -> None:
    model, prompts = tiny_llama(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    first = int(model(prompts).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first]
    model.generation_config.do_sample, model.generation_config.num_beams = True, 4
    assert speed._write(model, prompts, count).shape == (2, 3 + count)


def test_the_prompt_and_the_first_token_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 0.5, 21: 2.5}  # by the tokens that are written
    monkeypatch.setattr(speed, "median_seconds", lambda works, _: [seconds[work.args[2]] for work in works])
    assert speed.tokens_written_per_second([tiny_llama(), tiny_llama()], 3, 4, 20) == [30.0, 30.0]
    assert speed.first_token_seconds([tiny_llama()], 4) == [0.5]
    seconds[21] = 0.4  # noise
    assert speed.tokens_written_per_second([tiny_llama()], 3, 4, 20) == [math.inf]
