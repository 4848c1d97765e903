"""Train the bundled model and its tokenizer from nothing and write `hesso_hf/bundled/tiny_llama/`.

    python benchmarks/pretrain_bundled.py --threads 1

The number of steps and the dropout were chosen with `--validation`, which holds further topics out of the training
split and writes nothing; the test split chose nothing. Loss per token on those topics (nats):

    steps  dropout  loss
     1000      0.1  3.543
     1000      0.2  3.487
     2000      0.2  3.561
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hesso_hf.bundled import bundled_model_path, python_docs_topics, split_topics

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
VOCAB_SIZE = 1024
CONTEXT_LENGTH = 512
VALIDATION_BUCKET = 3
RESULTS_PATH = Path(__file__).resolve().parent / "results" / "pretrain_bundled.json"


@dataclass(frozen=True)
class PretrainConfig:
    """What the result depends on, apart from the versions."""

    steps: int
    warmup_steps: int
    batch_size: int
    block_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    max_grad_norm: float
    seed: int
    threads: int


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood (nats) over the predicted tokens of the held-out texts."""

    loss_per_token: float
    loss_per_byte: float
    num_tokens: int
    num_bytes: int


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text is encoded without loss, since each of the 256 bytes has a token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama with grouped-query attention and tied embeddings, small enough to ship in the package."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Token ids of the texts in one row, each text followed by the eos token: [T]."""
    token_ids: list[int] = []
    for text in texts:
        token_ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        token_ids.append(tokenizer.eos_token_id)
    return torch.tensor(token_ids)


def sample_batches(stream: Tensor, config: PretrainConfig) -> Iterator[Tensor]:
    """Batches [B, T] that cover the stream once per epoch, from another offset each epoch."""
    generator = torch.Generator().manual_seed(config.seed)
    batch: list[Tensor] = []
    while True:
        offset = int(torch.randint(config.block_size, (), generator=generator))
        num_blocks = (len(stream) - offset) // config.block_size
        blocks = stream[offset : offset + num_blocks * config.block_size].view(num_blocks, config.block_size)
        for index in torch.randperm(num_blocks, generator=generator).tolist():
            batch.append(blocks[index])
            if len(batch) == config.batch_size:
                yield torch.stack(batch)
                batch = []


@contextmanager
def residual_dropout(model: LlamaForCausalLM, probability: float) -> Iterator[None]:
    """Dropout on what enters the residual stream, which Llama's own configuration does not offer."""

    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return functional.dropout(output, probability, module.training)

    modules: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp.down_proj]
    handles = [module.register_forward_hook(drop) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_optimizer(model: LlamaForCausalLM, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms' scales alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train_model(model: LlamaForCausalLM, stream: Tensor, config: PretrainConfig) -> None:
    """Train in place for `config.steps` optimizer steps."""
    optimizer = build_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    batches = sample_batches(stream, config)
    model.train()
    start = time.perf_counter()
    with residual_dropout(model, config.dropout):
        for step in range(1, config.steps + 1):
            input_ids = next(batches)
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 0 or step == config.steps:
                seconds = time.perf_counter() - start
                print(f"step {step}/{config.steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: Tensor, block_size: int
) -> HeldOutLoss:
    """Loss over the stream's whole blocks, each read on its own; a block's first token is not predicted."""
    byte_lengths = torch.tensor([_byte_length(tokenizer, token_id) for token_id in range(len(tokenizer))])
    num_blocks = len(stream) // block_size
    blocks = stream[: num_blocks * block_size].view(num_blocks, block_size)
    total_loss = 0.0
    for batch in blocks.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total_loss += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    targets = blocks[:, 1:]
    num_bytes = int(byte_lengths[targets].sum())
    return HeldOutLoss(total_loss / targets.numel(), total_loss / num_bytes, targets.numel(), num_bytes)


def _byte_length(tokenizer: PreTrainedTokenizerFast, token_id: int) -> int:
    """Bytes of text a token stands for; byte-level BPE spells each byte as one character."""
    return 0 if token_id in tokenizer.all_special_ids else len(tokenizer.convert_ids_to_tokens(token_id))


def generate_sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """A continuation of the prompt, the prompt included."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def save_bundle(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        # safetensors leaves its file readable by the owner only, and a package keeps the mode it finds
        path.chmod(0o644)


def write_readme(out: Path, config: PretrainConfig, held_out: HeldOutLoss, num_parameters: int, sample: str) -> None:
    """Say what the folder holds, where its text comes from and how to make it again."""
    folder_bytes = sum(path.stat().st_size for path in out.iterdir())
    out.joinpath("README.md").write_text(
        f"""# tiny_llama

A Llama of {num_parameters:,} parameters with a byte-level BPE tokenizer of {VOCAB_SIZE} tokens, both trained from
nothing on the Python documentation which CPython {platform.python_version()} carries (`pydoc_data.topics`). It is for
tests, examples and first tries without a download, and of no use as a language model otherwise.

- Size: {folder_bytes:,} bytes without this file; weights in bfloat16, context {CONTEXT_LENGTH} tokens.
- Training: {config.steps:,} steps of {config.batch_size} x {config.block_size} tokens.
- Held-out topics (`python_docs_texts("test")`): {held_out.loss_per_token:.3f} nats per token,
  {held_out.loss_per_byte:.3f} nats per byte, in blocks of {config.block_size} tokens. Guessing evenly is
  {math.log(VOCAB_SIZE):.3f} nats per token.
- Licence of the text: Python documentation, Copyright Python Software Foundation, PSF License Version 2.
- Made by: `python benchmarks/pretrain_bundled.py --steps {config.steps} --threads {config.threads}`

A sample (temperature 0.7, top-k 40):

```text
{sample}
```
""",
        encoding="utf-8",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=bundled_model_path(), help="folder to write")
    parser.add_argument("--results", type=Path, default=RESULTS_PATH, help="JSON file to write")
    parser.add_argument("--validation", action="store_true", help="hold out training topics, write nothing")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--warmup-steps", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens per block")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's, on the matrices")
    parser.add_argument("--dropout", type=float, default=0.2, help="on what enters the residual stream")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    out, results = arguments.pop("out"), arguments.pop("results")
    validation = arguments.pop("validation")
    config = PretrainConfig(**arguments)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    train_topics, test_topics = python_docs_topics("train"), python_docs_topics("test")
    if validation:
        sides = split_topics(train_topics, VALIDATION_BUCKET)
        train_topics, test_topics = sides.train, sides.test
    train_texts, test_texts = list(train_topics.values()), list(test_topics.values())

    tokenizer = train_tokenizer(train_texts)
    model = build_model(tokenizer)
    stream, test_stream = encode_stream(tokenizer, train_texts), encode_stream(tokenizer, test_texts)
    num_parameters = model.num_parameters()
    print(f"{num_parameters:,} parameters, {len(stream):,} training tokens, {len(test_stream):,} held out", flush=True)

    start = time.perf_counter()
    train_model(model, stream, config)
    train_seconds = time.perf_counter() - start
    if validation:
        print(json.dumps(asdict(config) | asdict(evaluate(model, tokenizer, test_stream, config.block_size))))
        return

    save_bundle(model, tokenizer, out)
    # read back, so that the numbers are those of the rounded weights in the folder
    model = LlamaForCausalLM.from_pretrained(out)
    held_out = evaluate(model, tokenizer, test_stream, config.block_size)
    sample = generate_sample(model, tokenizer, 'The "with" statement', config.seed)
    write_readme(out, config, held_out, num_parameters, sample)
    report = {
        "config": asdict(config),
        "held_out": asdict(held_out),
        "num_parameters": num_parameters,
        "tokens_seen": config.steps * config.batch_size * config.block_size,
        "train_tokens": len(stream),
        "train_characters": sum(map(len, train_texts)),
        "test_characters": sum(map(len, test_texts)),
        "train_seconds": round(train_seconds, 1),
        "folder_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "sample": sample,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["held_out"]))


if __name__ == "__main__":
    main()
