"""Find a base model's folder: a local one as it is, a hub id through huggingface_hub's cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from convert.errors import InputError

NEEDED_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "*.model", "*token*.json"]


def resolve_folder(dir_or_hub_id: str | Path) -> Path:
    """Return the local folder of a base model, downloading the needed files of a hub id first.

    Raises InputError when there is neither such a folder nor such a repository within reach.
    """
    folder = Path(dir_or_hub_id)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(dir_or_hub_id), allow_patterns=NEEDED_FILES))
    except HFValidationError as error:
        raise InputError(f"{dir_or_hub_id}: no such folder, and not a hub id") from error
    except LocalEntryNotFoundError as error:
        message = f"{dir_or_hub_id}: no such folder, and the model hub cannot be reached nor is it in the cache"
        raise InputError(message) from error
    except HfHubHTTPError as error:
        raise InputError(f"{dir_or_hub_id}: no such folder, and the model hub says: {error}") from error
