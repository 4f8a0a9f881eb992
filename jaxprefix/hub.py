"""Find a base model's folder: a local one as it is, or a hub id's in huggingface_hub's cache."""

from pathlib import Path

from convert.errors import InputError, first_line
from convert.weights import SHARD_INDEX, SINGLE_FILE, TORCH_FILE, TORCH_INDEX, has_weights
from jaxprefix.settings import expanded

BASE_CONFIG = "config.json"
SENTENCEPIECE_FILES = ("spiece.model", "spm.model", "tokenizer.model")
TOKENIZERS_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
SMALL_FILES = [BASE_CONFIG, *SENTENCEPIECE_FILES, TOKENIZERS_FILE, VOCAB_FILE, MERGES_FILE]
SMALL_FILES += [ADDED_TOKENS_FILE, TOKENIZER_SETTINGS, SPECIAL_TOKENS]
SAFETENSORS = [SINGLE_FILE, SHARD_INDEX, "model-*.safetensors"]
TORCH_WEIGHTS = [TORCH_FILE, TORCH_INDEX, "pytorch_model-*.bin"]


def resolve_folder(dir_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a base model; for a hub id, everything but the weights is downloaded first.

    `revision` is a branch, tag or commit. Files in the cache are not fetched again; without a network, only the cache
    is used. Raises InputError when there is neither such a folder nor a repository that can be reached.
    """
    folder = expanded(dir_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{dir_or_hub_id}: is a folder; --revision is only for hub ids")
        return folder
    return _download(str(dir_or_hub_id), revision, SMALL_FILES)


def fetch_weights(dir_or_hub_id: str | Path, folder: Path) -> None:
    """Download a hub id's weights, of the same commit, to the `folder` that `resolve_folder` returned for it.

    They are safetensors, or torch's files where there are none. A local folder is left as it is. Raises InputError.
    """
    if folder == expanded(dir_or_hub_id):
        return
    for files in (SAFETENSORS, TORCH_WEIGHTS):
        _download(str(dir_or_hub_id), folder.name, SMALL_FILES + files)
        if has_weights(folder):
            return
    raise InputError(f"{dir_or_hub_id}: no weights in the cache, and the model hub is out of reach or has none")


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download  # imported late: takes a sixth of a second

    where = f"{hub_id}: no such folder, and"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise InputError(f"{where} not a hub id") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{where} access to it is restricted on the model hub: request access there, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where} on the model hub it has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{where} the model hub has no such repository; if it is private, run `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cause = first_line(error.__cause__ or error)
        raise InputError(f"{where} it is not all cached, and the model hub does not give the rest ({cause})") from error
    except errors.HfHubHTTPError as error:
        raise InputError(f"{where} the model hub says: {error}") from error
    except errors.HTTPError as error:
        raise InputError(f"{where} its download was interrupted; repeat the command to go on ({error})") from error
    except OSError as error:
        raise InputError(
            f"{where} it cannot be fetched into the cache ({error}); HF_HUB_OFFLINE=1 uses what is already there"
        ) from error
    except RuntimeError as error:  # from Xet, the hub's store of large files
        raise InputError(
            f"{where} its download failed ({error}); repeat the command, or try another way with HF_HUB_DISABLE_XET=1"
        ) from error
    except (ValueError, ImportError) as error:  # a login page instead of JSON; a proxy of an unknown kind
        raise InputError(f"{where} its download failed ({error})") from error
