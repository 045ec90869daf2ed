"""Models of the Hugging Face Hub in timm's format: `config.json` and `model.safetensors`, and never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oracle_server.sources.extras import need
from oracle_server.sources.network import Network
from oracle_server.sources.timm_models import network_of
from shared.models.loading import fill
from shared.models.weight_files import ModelError, read_weights

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def load_hub(name: str, weights: str | None) -> Network:
    """A model of the hub, or of the hub's cache on this machine.

    Args:
        name: OWNER/REPO, or OWNER/REPO@REVISION: a branch, a tag, or a commit, which alone is the same for ever.
        weights: None; or a file to take instead of the repository's weights.

    Raises:
        ModelError: a package is not installed; the repository or one of its files is not there or cannot be fetched; or
            it is not of timm's format.
    """
    said = f"'hf-hub:{name}'"
    need("huggingface_hub", "hub", said)
    timm = need("timm", "hub", said)
    repository, _, revision = name.partition("@")
    config = _fetch(repository, _CONFIG, revision or None)
    # Both of one commit, whatever is pushed in between: the folder in the cache is named for it.
    file = Path(weights) if weights is not None else _fetch(repository, _WEIGHTS, config.parent.name)
    try:
        module: Any = timm.create_model(f"local-dir:{config.parent}", pretrained=False)
        usual = dict(module.pretrained_cfg)
    except Exception as error:  # the architectures raise what they like
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ModelError(f"{said} is no model of timm's format: {reason}") from error
    state, info = read_weights(file)
    fill(module, state)
    return network_of(module, usual, info, (file,))


def _fetch(repository: str, file: str, revision: str | None) -> Path:
    """A file of a repository, from the cache where it is there already."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = repository if revision is None else f"{repository}@{revision}"
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"hf-hub:{at}: {file} is not in the cache, and the hub cannot be reached") from error
    except EntryNotFoundError as error:
        hint = ": weights are read from safetensors alone, pickles never" if file == _WEIGHTS else ""
        raise ModelError(f"hf-hub:{at} has no {file}{hint}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hf-hub:{repository} has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no repository '{repository}', or not for you (see HF_TOKEN)") from error
    except HFValidationError as error:
        raise ModelError(f"'hf-hub:{at}' names no repository: give OWNER/REPO or OWNER/REPO@REVISION") from error
    except Exception as error:  # of the network: the library's own, and its HTTP client's
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ModelError(f"hf-hub:{at}: {file} could not be fetched: {reason}") from error
