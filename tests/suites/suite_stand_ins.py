"""Stand-ins for what trainer suites load from the Hub: tiny models in a Hub cache of their own, and small data sets.

Imported without this repository's `tests` package: a suite has one of that name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

REVISION = "0" * 40
MODELS = {
    "hf-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "roneneldan/TinyStories-33M": "LlamaForCausalLM",
    "openai-community/gpt2": "GPT2LMHeadModel",
    "google-t5/t5-small": "T5ForConditionalGeneration",
    "google-bert/bert-base-cased-finetuned-mrpc": "BertForSequenceClassification",
    **dict.fromkeys(
        ("prajjwal1/bert-tiny", "bert-base-cased", "bert-base-uncased", "google-bert/bert-base-uncased"),
        "BertForMaskedLM",
    ),
}
PROCESSORS = {"openai/clip-vit-base-patch32": "CLIP", "facebook/wav2vec2-base-960h": "Wav2Vec2"}
TRL_MODELS = (
    "Qwen2ForCausalLM-2.5", "Qwen3ForCausalLM", "LlamaForCausalLM-3", "LlamaForCausalLM-3.1", "LlamaForCausalLM-3.2",
    "MistralForCausalLM-0.1", "MistralForCausalLM-0.2", "GptOssForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM",
    "Glm4MoeForCausalLM", "GPTNeoXForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Olmo3ForCausalLM", "Qwen2ForSequenceClassification-2.5", "Qwen3ForSequenceClassification",
    "LlamaForSequenceClassification-3.2",
)  # fmt: skip
TEMPLATES = {"Qwen3": "qwen3", "Llama": "llama3", "GptOss": "gptoss", "Glm4Moe": "glm4moe", "Cohere": "cohere"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
EXAMPLES = 17  # in each training split, as many as the data sets have that these stand for
SHARE = 32  # where a share of a split is asked for, 1% of many


def _tokenizer(architecture: str, end: str = "<|im_end|>") -> Any:
    """Return a tokenizer of single bytes, with the chat template that TRL knows for such models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bert = architecture.startswith("Bert")
    if bert:
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    gpt2 = architecture == "GPT2LMHeadModel"
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64 if gpt2 or bert else 4096,
        eos_token="[SEP]" if bert else "<|endoftext|>" if gpt2 else end,
        additional_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        **({} if gpt2 else {"pad_token": "[PAD]" if bert else "<|endoftext|>"}),
        **({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"} if bert else {}),
    )
    made.chat_template = None if bert or gpt2 else _template(architecture)
    return made


def _pieces(architecture: str) -> Any:
    """Return the tokenizer of a model whose own class wants pieces with scores: here of single characters."""
    import transformers

    special = ("<pad>", "</s>", "<unk>", "\u2581")
    letters, extra = map(chr, range(33, 127)), (f"<extra_id_{index}>" for index in reversed(range(100)))
    vocabulary = [(piece, -2.0 if len(piece) == 1 else 0.0) for piece in (*special, *letters, *extra)]
    return getattr(transformers, f"{architecture[:2]}Tokenizer")(vocabulary)


def _template(architecture: str) -> str | None:
    try:
        import trl
    except ImportError:
        return None
    name = next((name for start, name in TEMPLATES.items() if architecture.startswith(start)), "qwen2_5")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _config(model_class: Any, tokenizer: Any) -> Any:
    config_class = model_class.config_class
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 4096,
    }  # fmt: skip
    if config_class.model_type == "t5":
        sizes |= {"d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        sizes = {name: size for name, size in sizes.items() if "hidden" not in name and "attention" not in name}
    elif config_class.model_type == "gpt2":
        sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    elif config_class.model_type == "bert":  # whose MLP channels alone are pruned
        sizes |= {"intermediate_size": 512, "max_position_embeddings": 512}
    elif config_class.model_type != "gpt_neox":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if "Moe" in model_class.__name__ or config_class.model_type == "gpt_oss":
        sizes |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 40}
    if "Sequence" in model_class.__name__:
        sizes["num_labels"] = 2 if "Bert" in model_class.__name__ else 1
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    if config_class.model_type == "t5":
        tokens["decoder_start_token_id"] = 0
    return config_class(**sizes, **tokens)


def _processor(architecture: str) -> tuple[Any, ...]:
    """Return what reads pictures or sound for such a model, and the model's config, by which it is found."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")()
    if architecture == "Wav2Vec2":
        return config, transformers.Wav2Vec2FeatureExtractor()
    images, tokenizer = transformers.CLIPImageProcessor(), _tokenizer(architecture)
    tokenizer.model_max_length = 64
    return config, images, transformers.CLIPProcessor(images, tokenizer)


def make_models(cache: Path) -> list[str]:
    """Write models and processors into a Hub cache, where they aren't yet; return the names of those that can't be."""
    import torch
    import transformers

    missing = []
    names = MODELS | PROCESSORS | {f"trl-internal-testing/tiny-{name}": re.sub("-.*", "", name) for name in TRL_MODELS}
    for name, architecture in names.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        try:
            if name in PROCESSORS:
                made = _processor(architecture)
            else:
                model_class = getattr(transformers, architecture)
                end = "<|im_end|>" if name.startswith("trl") else "<|endoftext|>"
                tokenizer = _pieces(architecture) if architecture[:2] == "T5" else _tokenizer(architecture, end)
                made = model_class(_config(model_class, tokenizer)), tokenizer
            for part in made:
                part.save_pretrained(folder / "snapshots" / REVISION)
        except Exception as error:  # a class may ask for anything
            missing.append(f"{name}: {type(error).__name__}: {error}")
            continue
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
    return missing


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _zen(config: str, index: int) -> dict[str, Any]:
    """Return an example in one of TRL's formats: what is asked, a good answer and a bad one."""
    asked = ("Which is better,", "Is it", "What is")[index % 3] + f" number {index}"
    good, bad = f" the one that is {index}.", f" I don't know {index}!"
    style, kind = config.split("_", 1)
    prompt: Any = asked
    answers: list[Any] = [good, bad]
    whole: list[Any] = [asked + good, asked + bad]
    if style == "conversational":
        prompt, answers = _turn("user", asked), [_turn("assistant", text) for text in (good, bad)]
        whole = [prompt + answer for answer in answers]
    return {
        "language_modeling": {"messages" if style == "conversational" else "text": whole[0]},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": answers[0]},
        "preference": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        "implicit_prompt_preference": {"chosen": whole[0], "rejected": whole[1]},
        "unpaired_preference": {"prompt": prompt, "completion": answers[index % 2], "label": index % 2 == 0},
    }[kind]


def _rows(path: str, config: str | None, count: int) -> list[dict[str, Any]] | None:
    text = [f"{index} is a number and {index + 1} comes after it" * (1 + index % 3) for index in range(count)]
    if path == "trl-internal-testing/zen" and config is not None:
        return [_zen(config, index) for index in range(count)]
    return {
        "Salesforce/wikitext": [{"text": line * 3} for line in text],
        "fka/awesome-chatgpt-prompts": [{"act": line, "prompt": line} for line in text],
        "openai/gsm8k": [{"question": line, "answer": f"#### {index}"} for index, line in enumerate(text)],
        "abisee/cnn_dailymail": [{"article": line, "highlights": line[:20], "id": line[:3]} for line in text],
        "stanfordnlp/imdb": [{"text": line, "label": index % 2} for index, line in enumerate(text)],
    }.get(path)


def load_dataset_or_stand_in(plain: Any) -> Any:
    """Return a `load_dataset` that gives a stand-in where there is one, else what `plain` gives."""
    from datasets import Dataset, DatasetDict

    def load_dataset(path: str, name: str | None = None, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        sizes = {"train": EXAMPLES, "test": 2, "validation": 2}
        wanted = re.match(r"(\w+)(?:\[.*?(\d+)?(%?)\])?$", split) if split else None
        count = 0 if wanted is None else SHARE if wanted[3] else int(wanted[2] or 0)
        if _rows(path, name, 1) is None:
            return plain(path, name, *args, split=split, **kwargs)
        parts = {part: Dataset.from_list(_rows(path, name, size) or []) for part, size in sizes.items()}
        if wanted is None:
            return DatasetDict(train=parts["train"], test=parts["test"])
        made = Dataset.from_list(_rows(path, name, count)) if count > EXAMPLES else parts[wanted[1]]
        return made.to_iterable_dataset() if kwargs.get("streaming") else made

    return load_dataset


if __name__ == "__main__":
    for line in make_models(Path(sys.argv[1])):
        print(f"no stand-in: {line}")
