"""Checks that the real client libraries work against the stand-in Hub the other tests rely on."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loopback_hub import LoopbackHub

REPO = "user/tiny"

_TINY_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)

def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
"""

_ROUND_TRIP = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
model = tiny_model()
model.save_pretrained(folder)
words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
(folder / "README.md").write_text("---\\nlibrary_name: transformers\\n---\\n# tiny\\n")
(folder / "old").mkdir()
(folder / "old" / "a.bin").write_bytes(b"an LFS file")
(folder / "old" / "b.txt").write_text("a regular file")

api = HfApi()
assert api.whoami()["name"] == "user"
assert api.create_repo("user/tiny").repo_id == "user/tiny"
api.create_repo("user/tiny", exist_ok=True)
first = api.upload_folder(repo_id="user/tiny", folder_path=folder).oid

assert_same(AutoModelForCausalLM.from_pretrained("user/tiny").state_dict(), model.state_dict())
assert AutoTokenizer.from_pretrained("user/tiny")("b a c")["input_ids"] == [2, 1, 0]
assert Path(hf_hub_download("user/tiny", "old/b.txt")).read_text() == "a regular file"
info = api.model_info("user/tiny", files_metadata=True)
assert info.sha == first and not info.private
assert {s.rfilename for s in info.siblings if s.lfs} == {"model.safetensors", "old/a.bin"}

# Nothing changed, so nothing is committed.
assert api.upload_folder(repo_id="user/tiny", folder_path=folder).oid == first

readme = (folder / "README.md").read_bytes() + b"more"
for path in folder.rglob("*.*"):
    path.unlink()
(folder / "README.md").write_bytes(readme)
second = api.upload_folder(repo_id="user/tiny", folder_path=folder, delete_patterns="old/*").oid
assert second != first
assert not (Path(snapshot_download("user/tiny")) / "old").exists()
assert (Path(snapshot_download("user/tiny", revision=first)) / "old" / "a.bin").read_bytes() == b"an LFS file"
api.upload_file(path_or_fileobj=b"1", path_in_repo="dir/x.txt", repo_id="user/tiny")
api.delete_folder("dir", repo_id="user/tiny")
"""

_TRAINER = """
import sys
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

class Rows(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        row = torch.arange(8) + index
        return {"input_ids": row, "labels": row}

arguments = TrainingArguments(
    output_dir=sys.argv[1], push_to_hub=True, hub_model_id="user/trained", max_steps=1, save_steps=1, use_cpu=True,
    per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
)
trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=Rows())
trainer.train()
trainer.push_to_hub()
assert_same(AutoModelForCausalLM.from_pretrained("user/trained").state_dict(), trainer.model.state_dict())
"""

_WRONG_TOKEN = """
import os
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

def status(call, **arguments):
    try:
        call(**arguments)
    except HfHubHTTPError as error:
        return error.response.status_code

right, wrong, nobody = HfApi(), HfApi(token="hf_wrong"), HfApi(token=False)
upload = {"repo_id": "user/tiny", "path_or_fileobj": b"1", "path_in_repo": "x.bin"}
right.create_repo("user/tiny")
for api in (wrong, nobody):
    assert status(api.create_repo, repo_id="user/other") == 401
    assert status(api.create_repo, repo_id="user/tiny", exist_ok=True) == (401 if api is wrong else None)
    assert status(api.upload_file, **upload) == 401
assert status(wrong.whoami) == 401
assert status(wrong.model_info, repo_id="user/tiny") == 401
assert status(nobody.model_info, repo_id="user/tiny") is None
right.create_repo("user/secret", private=True)
assert status(nobody.model_info, repo_id="user/secret") == 401
assert right.model_info("user/secret").private
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A running stand-in."""
    with LoopbackHub() as running:
        yield running


def run_client(hub: LoopbackHub, script: str, cache: Path, *arguments: str) -> None:
    """Run a script in a process of its own, since the client reads its settings on import."""
    environment = {**os.environ, **hub.env(cache)}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{hub.requests}"


def test_round_trip_and_deletions(hub: LoopbackHub, tmp_path: Path) -> None:
    """A pushed model loads back exactly, its old commits stay, and deletions delete."""
    run_client(hub, _TINY_MODEL + _ROUND_TRIP, tmp_path / "cache", str(tmp_path / "model"))
    files = hub.files(REPO)
    assert {".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert files["README.md"].endswith(b"more")
    assert not [path for path in files if path.startswith(("old/", "dir/"))]
    # The repo's own commit, two pushes (the unchanged one made none), one file, one folder deletion.
    assert len(hub.commits(REPO)) == 5
    # The two LFS files went up once, though they were pushed twice.
    assert [method for method, _ in hub.requests].count("PUT") == 2


def test_wrong_token_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    """Only the right token writes; a wrong one does not even read."""
    run_client(hub, _WRONG_TOKEN, tmp_path / "cache")
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert "PUT" not in {method for method, _ in hub.requests}


@pytest.mark.slow  # tests/trainer/test_hub.py does the same with HessoTrainer
def test_trainer_push_to_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """`Trainer` creates the repo, pushes while it trains and at the end."""
    run_client(hub, _TINY_MODEL + _TRAINER, tmp_path / "cache", str(tmp_path / "out"))
    files = hub.files("user/trained")
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= files.keys()
    assert hub.commits("user/trained")[1:] == ["Training in progress, step 1", "End of training"]
