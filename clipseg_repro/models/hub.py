"""Models of the Hugging Face Hub as folders: from the Hub's cache, or fetched into it once, at a known commit."""

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from clipseg_repro.errors import InputError

CLIP = "openai/clip-vit-base-patch16"

# Hub id -> the commit that is loaded; of all others, the newest.
REVISIONS = {
    "CIDAS/clipseg-rd64-refined": "999e0328d9e10b484360c477313983f9afdd7050",
    CLIP: "57c216476eefef5ab752ec549e440a49ae4ae5f3",
}

# Parts of a model: patterns of which one of its files has to match each.
CONFIG, TOKENIZER, PROCESSOR = r"config\.json", r"tokenizer\.json|merges\.txt", r"(pre)?processor_config\.json"
WEIGHTS = r"model[\w.-]*\.safetensors|pytorch_model[\w.-]*\.bin"
SMALL = r"[\w.-]+\.(json|txt)"  # always fetched


def is_id(name):
    return bool(re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name))


def storage(name):
    """The folder of the Hub's cache for all commits of a model."""
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def fetched(name, *parts):
    """The folder of the Hub's model `name`, with files that match each of `parts`; what is cached is not fetched again.

    Raises InputError, within seconds if there is no network, for what is neither in the cache nor can be fetched.
    """
    revision = REVISIONS.get(name)
    newest = storage(name) / "refs" / "main"
    commit = revision or (newest.read_text() if newest.is_file() else "none")
    cached = storage(name) / "snapshots" / commit
    if _complete(cached, parts):
        return cached
    try:
        # one try: huggingface_hub itself would wait for a lost network, minutes if it is to fetch many files
        info = HfApi().model_info(name, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
        files = [file.rfilename for file in info.siblings if re.fullmatch("|".join((SMALL, *parts)), file.rfilename)]
        if any(file.endswith(".safetensors") for file in files):
            files = [file for file in files if not file.endswith(".bin")]  # the same weights
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # of many kinds: of the Hub's answers, its client's network, the disk ...
        raise InputError(_complaint(name, cached, parts, error)) from error


def _complete(folder, parts):
    files = [file.name for file in folder.glob("*") if file.exists()]  # of a broken link, the rest has not arrived
    found = all(any(re.fullmatch(part, file) for file in files) for part in parts)
    return found and all(_shards(index) <= set(files) for index in folder.glob("*.safetensors.index.json"))


def _shards(index):
    """The files of weights that an index names; none if it is damaged, which loading will tell."""
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _complaint(name, cached, parts, error):
    others = [folder for folder in cached.parent.glob("*") if _complete(folder, parts)]
    if others:
        wanted = REVISIONS.get(name, "the newest")
        where = f"is in the cache at commit {others[0].name}, not at {wanted}, which is the one to load"
        besides = f"give the folder '{others[0]}' as the model to use that commit"
    elif cached.is_dir():
        where, besides = f"is only partly in the cache ('{cached}')", "use 'mini'; whole files that arrived are kept"
    else:
        where, besides = f"is not in the cache {HF_HUB_CACHE}", "use 'mini', which needs no network"
    if isinstance(error, (RepositoryNotFoundError, ValueError)):
        advice = "check the name"
    elif isinstance(error, HfHubHTTPError):
        advice = "try again later"
    else:
        advice = "check the disk" if getattr(error, "errno", None) else "check the network"
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"model '{name}' is no folder, {where}, and could not be fetched from {ENDPOINT} "
        f"({type(error).__name__}: {reason}): {advice}, or {besides}"
    )
