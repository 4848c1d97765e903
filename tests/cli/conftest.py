"""What several tests of the command line run with."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from hesso_hf.bundled import bundled_model_path
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a short run on a tiny model, but for where it writes."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(vocab_size=1024).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(folder / "model")
    rows = [json.dumps({"text": f"Sentence number {i} isn't number {i + 1}. " * 4}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    return [
        "prune", "--model", str(folder / "model"), "--dataset", str(folder / "text.jsonl"), "--block_size", "16",
        "--max_steps", "6", "--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true",
        "--use_cpu", "true", "--target_sizes", '{"intermediate_size": 28}', "--healing", "off", "--replay_share", "0",
        "--calibration_examples", "0", "--hesso_warmup_steps", "1", "--pruning_steps", "3", "--save_steps", "2",
    ]  # fmt: skip
