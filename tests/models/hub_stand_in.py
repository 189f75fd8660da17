"""A stand-in of the Hugging Face Hub on this machine, and what `load_model` does with it: a script for test_loading.py.

Arguments: a save_pretrained folder, and a folder for the cache. It prints a line of JSON for every model that it loads:
its mark (see `marked`) or its error, what the Hub was asked, and the seconds that it took.
"""

import hashlib
import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from safetensors.torch import load, save

PINNED, UNPINNED = "CIDAS/clipseg-rd64-refined", "CIDAS/clipseg-rd16"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path).strip("/")
        server.asked.append((self.command, path, self.headers.get("Range")))
        parts = path.removeprefix("api/models/").split("/")
        name, place, commits = "/".join(parts[:2]), parts[2:4], server.models.get("/".join(parts[:2]))
        if commits is None:
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        revision = place[1] if len(place) > 1 else "main"
        commit = next(iter(commits)) if revision == "main" else revision  # the newest is first
        if commit not in commits:
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if not path.startswith("api/"):
            return self._file(files["/".join(parts[4:])], commit)
        if place[:1] == ["tree"]:
            rows = [{"type": "file", "path": k, "size": len(v), "oid": _etag(v)} for k, v in files.items()]
        else:
            rows = {"id": name, "sha": commit, "siblings": [{"rfilename": k} for k in files]}
        self._answer(200, json.dumps(rows).encode())

    def _file(self, content, commit):
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = (
            self.server.cuts.pop()
            if self.command == "GET" and [n for n in self.server.cuts if n < len(content)]
            else None
        )
        self._answer(206 if start else 200, content[start:], headers, cut)

    def _answer(self, status, body=b"", headers=(), cut=None):
        self.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


def _etag(content):
    return hashlib.sha1(content).hexdigest()


def marked(files, mark):
    """The files of a model whose first FiLM bias is `mark`, and two that are of no use."""
    weights = load(files["model.safetensors"])
    weights["decoder.film_mul.bias"][0] = mark
    more = {"model.safetensors": save(weights, {"format": "pt"}), "pytorch_model.bin": b"", "README.md": b"# CLIPSeg"}
    return files | more


def main(folder, cache):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    # name -> commit, the newest first -> file -> bytes; requests; an answer is cut after so many bytes
    server.models, server.asked, server.cuts = {}, [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    os.environ |= address | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}

    from huggingface_hub import constants, snapshot_download

    from clipseg_repro.errors import InputError
    from clipseg_repro.models.hub import REVISIONS, storage
    from clipseg_repro.models.loading import load_model

    def tried(case, name):
        server.asked.clear()
        start = time.monotonic()
        try:
            found = {"mark": load_model(name)[0].decoder.film_mul.bias[0].item()}
        except InputError as error:
            found = {"error": str(error)}
        print(json.dumps({"case": case, "asked": server.asked, "seconds": time.monotonic() - start, **found}))

    constants.DOWNLOAD_CHUNK_SIZE = 10_000  # of 10 MB, a part of which is not resumed
    commit = REVISIONS[PINNED]
    server.models[PINNED] = {"b" * 40: marked(files, 2), commit: marked(files, 1)}
    server.models[UNPINNED] = {"c" * 40: marked(files, 3)}
    server.cuts.append(100_000)
    tried("pinned", PINNED)
    tried("pinned again", PINNED)
    weights = storage(PINNED) / "snapshots" / commit / "model.safetensors"
    weights.resolve().unlink()
    tried("half-finished", PINNED)
    tried("unpinned", UNPINNED)
    server.models[UNPINNED] = {"d" * 40: marked(files, 4), **server.models[UNPINNED]}
    tried("the Hub moved on", UNPINNED)
    tried("unknown", "nobody/clipseg")

    other = Path(snapshot_download(PINNED, revision="b" * 40, allow_patterns=list(files)))

    server.shutdown()
    server.server_close()
    tried("offline", PINNED)
    tried("offline, not cached", "CIDAS/clipseg-rd64")
    weights.resolve().unlink()
    tried("offline, another commit", PINNED)
    tried("its folder", other)
    (other / "config.json").unlink()
    tried("offline, half-finished", PINNED)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
